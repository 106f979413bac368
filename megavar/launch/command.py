"""`megavar launch`: start a run on this machine or submit it to a cluster; then ask for it, or cancel it."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavar.cli import reported, show_logs
from megavar.config.load import load_config, load_settings
from megavar.config.schema import RunConfig
from megavar.launch import jobs, nemo
from megavar.launch.local import run_on_enough_ranks
from megavar.launch.slurm import MAX_REQUEUES, SlurmSettings, check_job, job_script
from megavar.runs.folder import Run

SETTINGS = Path("conf") / "launch"
TAIL_LINES = 5
"""Of rank 0's log, under a status."""


def main(arguments: Sequence[str]) -> int:
    """Run `megavar launch ...`; returns the exit code."""
    if arguments and arguments[0] in ("status", "cancel"):
        return _look(arguments[0], arguments[1:])
    parser = argparse.ArgumentParser(
        "megavar launch",
        description="Start all stages of a run that are not finished, here or as one job of a cluster.",
        epilog="megavar launch status RUN | cancel RUN: the job of the run in this folder (docs/cluster.md).",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "--executor",
        default="local",
        metavar="NAME",
        help="local (default): this machine; else the Slurm settings of conf/launch/NAME.yaml, or a YAML file, or a "
        "function of $NEMORUN_HOME/executors.py that returns an executor of NeMo-Run",
    )
    parser.add_argument(
        "--executors", type=Path, metavar="FILE", help="Python file that has the function, instead of executors.py"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="instead of the settings' nodes")
    parser.add_argument("--time", metavar="LIMIT", help="instead of the settings' time, such as 4:00:00")
    parser.add_argument(
        "--max-requeues",
        type=int,
        metavar="N",
        help=f"how often a Slurm job puts itself into the queue again (default: {MAX_REQUEUES}): after the time limit, "
        "a preemption, or a failure after progress",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the run and print what would be started")
    parser.add_argument("--wait", action="store_true", help="follow the job, and end with its exit code")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.executor == "local" and chosen.executors is None:
        return _launch_here(chosen)
    return _launch_job(chosen)


def _launch_here(chosen: argparse.Namespace) -> int:
    command = ["-m", "megavar", "run", "--config", str(chosen.config), *chosen.overrides]

    def check() -> None:
        for flag in ("nodes", "time", "max_requeues"):
            if getattr(chosen, flag) is not None:
                name = flag.replace("_", "-")
                raise ValueError(f"--{name} is for a cluster; name its settings with --executor, or leave it out.")
        if chosen.dry_run:
            ranks = load_config(chosen.config, chosen.overrides).parallel.least_ranks
            print(shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(ranks), *command]))

    code = reported(check)
    return code if code or chosen.dry_run else run_on_enough_ranks(chosen.config, chosen.overrides, command)


def _launch_job(chosen: argparse.Namespace) -> int:
    submitted: list[tuple[str, Path]] = []
    codes: list[int] = []

    def work() -> None:
        config = load_config(chosen.config, chosen.overrides)
        show_logs(config.logging.level)
        if chosen.max_requeues is not None and chosen.max_requeues < 0:
            raise ValueError(f"--max-requeues {chosen.max_requeues} is too small; the least is 0.")
        file = nemo.executors_file(chosen.executors)
        by_nemo = chosen.executors is not None or (not _settings_file(chosen.executor).is_file() and file.is_file())
        prepared = _by_nemo(chosen, config, file) if by_nemo else _by_sbatch(chosen, config)
        if chosen.dry_run:
            print(prepared.text(), end="")
            return
        folder = Run(config).folder
        jobs.refuse_second(folder)
        job = prepared.submit()
        jobs.remember(job, folder)
        if jobs.is_slurm(job):
            print(f"job {job} is submitted; `megavar launch status {folder}` asks for it")
            submitted.append((job, folder))
        else:
            codes.append(_show(jobs.state_of(job, folder)))

    code = reported(work)
    if code or codes or not (chosen.wait and submitted):
        return code or next(iter(codes), 0)
    ((job, folder),) = submitted
    return _follow(job, folder)


def _show(state: jobs.JobState) -> int:
    """Print it; returns the exit code, 0 for a job that waits or runs."""
    print(state)
    return state.exit_code if state.is_over else 0


@dataclass(frozen=True)
class _Prepared:
    """A job that was checked and can be printed or submitted."""

    text: Callable[[], str]
    submit: Callable[[], str]


def _by_sbatch(chosen: argparse.Namespace, config: RunConfig) -> _Prepared:
    file = _settings_file(chosen.executor)
    if not file.is_file():
        known = ", ".join(["local", *sorted(path.stem for path in SETTINGS.glob("*.yaml"))])
        raise ValueError(f"--executor {chosen.executor}: there is no {file}; use one of {known}, or give a YAML file.")
    settings = replace(load_settings(SlurmSettings, file), **_given(chosen))
    check_job(config, settings)
    requeues = MAX_REQUEUES if chosen.max_requeues is None else chosen.max_requeues
    script = job_script(config, settings, requeues, chosen.config, chosen.overrides)
    return _Prepared(lambda: script, lambda: jobs.submit(script, Run(config).folder))


def _by_nemo(chosen: argparse.Namespace, config: RunConfig, file: Path) -> _Prepared:
    executor = nemo.load_executor(file, chosen.executor, _given(chosen), Run(config).folder)
    if chosen.max_requeues is not None and not nemo.is_slurm(executor):
        raise ValueError(f"--max-requeues is for a Slurm job, not for a {type(executor).__name__}; leave it out.")
    check_job(config, nemo.settings_of(executor))
    requeues = MAX_REQUEUES if chosen.max_requeues is None else chosen.max_requeues
    script = nemo.prepare(executor, config, requeues, chosen.config, chosen.overrides)
    return _Prepared(
        lambda: nemo.render(executor, config, script), lambda: nemo.submit(executor, config, script, chosen.wait)
    )


def _given(chosen: argparse.Namespace) -> dict[str, Any]:
    """What flags say instead of the settings."""
    given = {"nodes": chosen.nodes, "time": chosen.time}
    return {key: value for key, value in given.items() if value is not None}


def _settings_file(name: str) -> Path:
    """Where the settings are that `--executor` may name."""
    return Path(name) if name.endswith((".yaml", ".yml")) else SETTINGS / f"{name}.yaml"


def _follow(job: str, folder: Path) -> int:
    codes: list[int] = []
    try:
        code = reported(lambda: codes.append(jobs.follow(job, folder).exit_code))
    finally:
        if not codes:
            print(f"job {job} is not followed any more; `megavar launch status {folder}` asks for it")
    return code or codes[0]


def _look(action: str, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(f"megavar launch {action}")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    folder = parser.parse_args(arguments).run
    codes: list[int] = []

    def status() -> None:
        job = jobs.require_job(folder)
        codes.append(_show(jobs.state_of(job, folder)))
        if not jobs.is_slurm(job):
            return  # NeMo-Run has the log
        log = jobs.rank_zero_log(folder)
        if log is not None:
            print(f"{log}:", *log.read_text(errors="replace").splitlines()[-TAIL_LINES:], sep="\n  ")
        for line in jobs.errors_elsewhere(folder):
            print(line)

    def cancel() -> None:
        job = jobs.require_job(folder)
        jobs.cancel(job, folder)
        print(f"job {job} is told to stop; its ranks save if Slurm gives them the time (KillWait)")
        codes.append(0)

    code = reported(status if action == "status" else cancel)
    return code or codes[0]
