"""What the driver says of the GPUs' memory, and the line that refuses servers."""

import os
import stat
import time
from pathlib import Path

import pytest

from megavar.rollout import gpu_memory
from megavar.rollout.engine import RolloutError
from megavar.rollout.gpu_memory import GpuMemory, read_memory, refuse_taken_memory, require_free_memory

DEVICES = """0, GPU-aa, 81152, 81559
1, GPU-bb, 30720, 81920
2, GPU-cc, 20480, 81920
3, GPU-dd, [N/A], [N/A]
"""
PROCESSES = """GPU-bb, 4711, /usr/bin/python3.11, 49152
GPU-bb, 4712, sglang::scheduler, [N/A]
"""


def test_free_memory_and_its_holders_are_read() -> None:
    first, second, third = read_memory(DEVICES, PROCESSES)  # one without figures is left out
    assert first == GpuMemory("0", "GPU-aa", 79.25, 81559 / 1024, ())
    assert second == GpuMemory(
        "1", "GPU-bb", 30.0, 80.0, ("pid 4711 (python3.11, 48.0 GiB)", "pid 4712 (sglang::scheduler)")
    )
    assert (third.free_gib, third.holders) == (20.0, ())
    assert read_memory("", "") == read_memory("No devices were found\n", "\n") == []


def test_too_little_free_memory_is_refused_with_who_holds_it() -> None:
    memory = read_memory(DEVICES, PROCESSES)
    refuse_taken_memory(memory, 0.25)
    refuse_taken_memory(memory[:2], 0.375)  # exactly what is free
    with pytest.raises(RolloutError) as refused:
        refuse_taken_memory(memory, 0.85)
    assert str(refused.value) == (
        "no memory for servers with rollout.mem_fraction=0.85: "
        "GPU 1 has 30.0 of 80.0 GiB free and needs 68.0, held by pid 4711 (python3.11, 48.0 GiB), pid 4712 "
        "(sglang::scheduler); "
        "GPU 2 has 20.0 of 80.0 GiB free and needs 68.0, held by processes that the driver does not name. "
        "Stop what holds it, or lower rollout.mem_fraction (docs/troubleshooting.md#server-does-not-start)."
    )


def put_smi_on_path(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_driver_that_answers_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About devices and about processes, and what it says counts."""
    answer = f"""case "$*" in
*--query-gpu=index,uuid,memory.free,memory.total*--format=csv,noheader,nounits) printf '{DEVICES}' ;;
*--query-compute-apps=gpu_uuid,pid,process_name,used_memory*) printf '{PROCESSES}' ;;
esac"""
    put_smi_on_path(tmp_path, answer, monkeypatch)
    require_free_memory(["0"], 0.85)
    with pytest.raises(RolloutError, match=r"GPU 1 has 30\.0 of 80\.0 GiB free .* held by pid 4711 \(python3\.11"):
        require_free_memory(["0", "GPU-bb"], 0.85)


def test_a_driver_that_hangs_is_an_error_within_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_smi_on_path(tmp_path, "exec sleep 600", monkeypatch)
    monkeypatch.setattr(gpu_memory, "ANSWER_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(
        RolloutError, match=r"nvidia-smi .* has not answered within 0\.5 s: the driver of this node hangs"
    ):
        require_free_memory(["0"], 0.85)
    assert time.monotonic() - started < 60
