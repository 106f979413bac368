"""A run as one Slurm job: its settings, the script that `sbatch` takes, and what is refused before it does.

The script says all that the job does, and works without this module. `srun` starts one agent a node
(`megavar.launch.node`), which start the ranks and meet at the first node.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megavar.config.schema import RunConfig, at_least, validate
from megavar.rollout.sglang_servers import check_interpreter, device_slices
from megavar.runs.folder import Run
from megavar.stages.check import check_run

MAX_REQUEUES = 20
"""How often a job puts itself into the queue again, after the time limit, a preemption or a failure, by default."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+:\d\d:\d\d")


@dataclass
class SlurmSettings:
    """What a job asks Slurm for and what it runs in: the keys of conf/launch/NAME.yaml."""

    account: str | None = None
    """Null: Slurm's default for the user."""
    partition: str | None = None
    """Null: Slurm's default."""
    nodes: int = at_least(1, default=1)
    """Nodes of the job."""
    gpus_per_node: int = at_least(0, default=8)
    """GPUs asked for on each node; 0: none is asked for, for nodes without GPUs and clusters that do not count them."""
    ranks_per_node: int | None = None
    """Ranks on each node; null: one for each of its GPUs."""
    cpus_per_node: int | None = None
    """CPUs asked for on each node; null: whole nodes (`--exclusive`)."""
    time: str = "4:00:00"
    """Limit of one start of the job, [DAYS-]HOURS:MINUTES:SECONDS, in quotes."""
    warn_seconds: int = at_least(1, default=300)
    """The run is asked to save and stop this long before the limit: at least one step, one save and a minute."""
    container_image: str | None = None
    """For Pyxis: a registry's image or a .sqsh file; null: no container."""
    container_mounts: list[str] = field(default_factory=list)
    """HOST:CONTAINER folders; the working directory is mounted in any case."""
    python: str | None = None
    """Interpreter of the training environment, on the nodes or in the container; null: the one that submits."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, beside those of the shell that submits."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before the run starts, such as `module load cuda`; what they export reaches every node."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, such as `--qos=low`."""

    @property
    def num_ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def num_ranks(self) -> int:
        """World size of the job."""
        return self.nodes * self.num_ranks_per_node


def check_job(config: RunConfig, settings: SlurmSettings) -> None:
    """Refuse what would fail in the job, as far as the machine that submits can see it.

    Raises:
        ValueError: for the first thing that is wrong.
    """
    _check_settings(settings)
    layout, ranks = config.parallel, settings.num_ranks
    if ranks % layout.least_ranks:
        raise ValueError(
            f"nodes={settings.nodes} x {settings.num_ranks_per_node} ranks = {ranks} ranks do not fit the parallel "
            f"layout: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}, expert "
            f"{layout.expert}, needs a multiple of {layout.least_ranks}; change --nodes or the layout."
        )
    rollout = config.rollout
    if rollout.mode == "managed":
        gpus = [str(index) for index in range(settings.gpus_per_node)]
        device_slices(gpus, rollout.num_servers, rollout.tensor_parallel_size)
    if settings.container_image is None:
        _check_python(settings.python or sys.executable)
        if rollout.mode == "managed":
            check_interpreter(rollout.python)
    # The nodes have GPUs and environments that this machine may not have; they check those when the job starts.
    elsewhere = replace(
        config,
        precision=replace(config.precision, recipe="bf16"),
        score=replace(config.score, precision="auto"),
        rollout=replace(rollout, mode="external"),
    )
    check_run(elsewhere, ranks)


def _check_settings(settings: SlurmSettings) -> None:
    validate(settings)  # again: flags may have replaced values of the file
    gpus, ranks = settings.gpus_per_node, settings.ranks_per_node
    if settings.num_ranks_per_node < 1:
        raise ValueError(f"gpus_per_node={gpus} and ranks_per_node={ranks} leave no rank on a node; set one of them.")
    if gpus and ranks is not None and ranks > gpus:
        raise ValueError(f"ranks_per_node={ranks} is more than gpus_per_node={gpus}; each rank needs a GPU.")
    if settings.cpus_per_node is not None and settings.cpus_per_node < 1:
        raise ValueError(f"cpus_per_node={settings.cpus_per_node} is too small; the least is 1.")
    if not _TIME.fullmatch(settings.time):
        raise ValueError(
            f"time={settings.time!r} is not [DAYS-]HOURS:MINUTES:SECONDS; in a file it needs quotes, "
            "time: '4:00:00', since YAML reads 4:00:00 as a number."
        )
    for name in settings.environment:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"environment has {name!r:.100}, which is not the name of a variable.")
    for option in _options("", settings):
        if "\n" in option or not option.startswith("--"):
            raise ValueError(f"sbatch={option!r:.100} is not an option of one line, such as --qos=low.")


def _check_python(python: str) -> None:
    advice = "set python to the interpreter of the training environment, on a file system that the nodes share"
    if shutil.which(python) is None:
        raise ValueError(f"python={python} is not an executable; {advice}.")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('megavar') is None)"
    if subprocess.run([python, "-c", probe], capture_output=True).returncode:
        raise ValueError(f"python={python} cannot import megavar; {advice}.")


def job_script(
    config: RunConfig, settings: SlurmSettings, max_requeues: int, config_file: Path, overrides: Sequence[str]
) -> str:
    """The script of the job, for `sbatch`."""
    here, folder = Path.cwd(), Run(config).folder.absolute()
    container = []
    if settings.container_image is not None:
        mounts = [f"{here}:{here}", f"{folder.parent}:{folder.parent}", *settings.container_mounts]
        container = [
            f"--container-image={settings.container_image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={here}",
        ]
    command = [settings.python or sys.executable, "-u", "-m", "megavar.launch.node"]
    arguments = ["--ranks", str(settings.num_ranks_per_node), "--config", str(config_file), *overrides]
    lines = [
        "#!/bin/bash",
        f"# Run {config.name} on {settings.nodes} x {settings.num_ranks_per_node} ranks, as `megavar launch` wrote it;",
        "# `sbatch` with this file submits it, too.",
        *(f"#SBATCH {shlex.quote(option)}" for option in _options(config.name, settings)),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.environment.items()),
        *settings.setup,
        f"container=({shlex.join(container)})",
        f"agent=({shlex.join(command)})",
        f"arguments=({shlex.join(arguments)})",
    ]
    return "\n".join(lines) + "\n" + start_and_end(folder, max_requeues) + _RANKS


def start_and_end(folder: Path, max_requeues: int) -> str:
    """Lines of bash for the script of any job of a run, before it starts the agents by `srun`.

    They choose this start's folder of logs ($logs), where the agents meet ($MASTER_ADDR, $MASTER_PORT), and define
    `end CODE`, which ends the script or puts the job into the queue again.
    """
    return f"run={shlex.quote(str(folder))}\nmax_requeues={max_requeues}\n{_START}{_END}"


def _options(name: str, settings: SlurmSettings) -> list[str]:
    cpus = settings.cpus_per_node
    options = {
        "--job-name": name,
        "--account": settings.account,
        "--partition": settings.partition,
        "--nodes": settings.nodes,
        "--ntasks-per-node": 1,
        "--gpus-per-node": settings.gpus_per_node or None,
        "--cpus-per-task": cpus,
        "--time": settings.time,
        "--signal": f"TERM@{settings.warn_seconds}",
        "--chdir": Path.cwd(),
        "--output": "/dev/null",  # the script opens its own, in a folder that it makes
    }
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    return [*given, *(["--exclusive"] if cpus is None else []), "--requeue", *settings.sbatch]


_START = r"""attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
logs=$run/logs/$attempt
mkdir -p "$logs" "$run/launch"
ln -sfn "$attempt" "$run/logs/latest"
echo "$SLURM_JOB_ID" >"$run/launch/job_id"
exec >>"$logs/job.log" 2>&1

# The agents meet at the first node, which is this one.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

trap : TERM # which the agents get too; this script waits until their ranks have saved
"""
_END = r"""
progressed() { # records or checkpoints since this start
	[ -n "$(find "$run" \( -name '*.parquet' -o -name 'step_*' \) -newer "$run/launch/job_id" -print -quit)" ]
}

end() { # with the largest exit code of the nodes
	local code=$1 first
	if [ "$code" -eq 0 ]; then exit 0; fi
	# Of the node that ended first: srun then stops the others, also after one that was killed and left none.
	first=$(cat "$logs/exit_code" || echo "$code")
	if [ "$code" -ne 137 ] || [ "$first" -ne 75 ]; then code=$first; fi
	case $code in
	75 | 143) echo "stopped before the end" ;;
	2) exit 2 ;; # a mistake of the user's, which a new start would repeat
	*)
		echo "failed with exit code $code"
		if ! progressed; then
			echo "error: no progress since this start, so the job is not requeued"
			exit "$code"
		fi
		;;
	esac
	if [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" != RUNNING ]; then
		exit "$code" # cancelled, or requeued by Slurm itself
	fi
	if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
		echo "error: requeued $max_requeues times (--max-requeues) already; submitting again goes on"
		exit "$code"
	fi
	echo "requeued"
	scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until Slurm ends this script
	exit "$code"
}
"""
_RANKS = r"""
srun --kill-on-bad-exit=1 --output="$logs/node_%n.log" "${container[@]}" "${agent[@]}" --logs "$logs" "${arguments[@]}"
end $?
"""
