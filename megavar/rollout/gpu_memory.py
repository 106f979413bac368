"""Whether the memory that servers will take is free on their GPUs, by the driver's figures, and who holds it if not."""

import csv
import logging
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import PurePath

from megavar.rollout.engine import RolloutError

logger = logging.getLogger(__name__)

DEVICE_FIELDS = "index,uuid,memory.free,memory.total"
PROCESS_FIELDS = "gpu_uuid,pid,process_name,used_memory"
ANSWER_SECONDS = 60.0
"""nvidia-smi needs up to 20 on a node whose driver has to load first; with a wedged driver it never ends."""


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU."""

    index: str
    uuid: str
    free_gib: float
    total_gib: float
    holders: tuple[str, ...]
    """Processes that have some, as far as the driver names them (it sees none of another container)."""


def require_free_memory(gpus: list[str], fraction: float | None) -> None:
    """Check and log that `fraction` of the memory of each GPU is free; nothing without GPUs or fraction.

    Args:
        gpus: indices or UUIDs; others (parts of a GPU) are passed over.
        fraction: of a GPU's memory.

    Raises:
        RolloutError: it is not, with who holds it; or the driver does not answer.
    """
    smi = shutil.which("nvidia-smi")
    if smi is None or not gpus or fraction is None:
        return

    known = read_memory(_ask(smi, f"--query-gpu={DEVICE_FIELDS}"), _ask(smi, f"--query-compute-apps={PROCESS_FIELDS}"))
    used = [gpu for gpu in known if any(gpu.index == name or gpu.uuid.startswith(name) for name in gpus)]
    for gpu in used:
        logger.info("GPU %s: %.1f of %.1f GiB are free for servers.", gpu.index, gpu.free_gib, gpu.total_gib)
    refuse_taken_memory(used, fraction)


def _ask(smi: str, query: str) -> str:
    """What nvidia-smi prints; a process that hangs in the driver cannot even be killed, so it is not waited for."""
    command = [smi, query, "--format=csv,noheader,nounits"]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        return asked.communicate(timeout=ANSWER_SECONDS)[0]
    except subprocess.TimeoutExpired:
        asked.kill()
        raise RolloutError(
            f"`{' '.join(command)}` has not answered within {ANSWER_SECONDS:g} s: the driver of this node hangs, so no "
            "server can start on its GPUs. Run nvidia-smi there, and reset the GPUs or restart the node."
        ) from None


def read_memory(devices: str, processes: str) -> list[GpuMemory]:
    """Parse nvidia-smi's CSV of DEVICE_FIELDS and PROCESS_FIELDS, MiB; GPUs without figures are left out."""
    holders: dict[str, list[str]] = {}
    for row in _rows(processes, PROCESS_FIELDS):
        uuid, pid, program, used_mib = row
        used = f", {int(used_mib) / 1024:.1f} GiB" if used_mib.isdecimal() else ""
        holders.setdefault(uuid, []).append(f"pid {pid} ({PurePath(program).name}{used})")
    return [
        GpuMemory(index, uuid, int(free_mib) / 1024, int(total_mib) / 1024, tuple(holders.get(uuid, ())))
        for index, uuid, free_mib, total_mib in _rows(devices, DEVICE_FIELDS)
        if free_mib.isdecimal() and total_mib.isdecimal()
    ]


def _rows(text: str, fields: str) -> list[list[str]]:
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [row for row in rows if len(row) == len(fields.split(","))]


def refuse_taken_memory(gpus: list[GpuMemory], fraction: float) -> None:
    """Raise RolloutError, on one line, if less than `fraction` of the memory of a GPU is free."""
    taken = [
        f"GPU {gpu.index} has {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free and needs "
        f"{fraction * gpu.total_gib:.1f}, held by {', '.join(gpu.holders) or 'processes that the driver does not name'}"
        for gpu in gpus
        if gpu.free_gib < fraction * gpu.total_gib
    ]
    if taken:
        raise RolloutError(
            f"no memory for servers with rollout.mem_fraction={fraction:g}: {'; '.join(taken)}. Stop what holds it, or "
            "lower rollout.mem_fraction (docs/troubleshooting.md#server-does-not-start)."
        )
