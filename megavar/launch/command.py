"""`megavar launch`: start a run on this machine or submit it to a cluster; then ask for it, or cancel it."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megavar.cli import reported, show_logs
from megavar.config.load import load_config, load_settings
from megavar.launch import jobs
from megavar.launch.local import run_on_enough_ranks
from megavar.launch.slurm import SlurmSettings, check_job, job_script
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
        help="local (default): this machine; else the Slurm settings of conf/launch/NAME.yaml, or a YAML file",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="instead of the settings' nodes")
    parser.add_argument("--time", metavar="LIMIT", help="instead of the settings' time, such as 4:00:00")
    parser.add_argument("--dry-run", action="store_true", help="check the run and print what would be started")
    parser.add_argument("--wait", action="store_true", help="follow the job, and end with its exit code")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.executor == "local":
        return _launch_here(chosen)
    return _launch_job(chosen)


def _launch_here(chosen: argparse.Namespace) -> int:
    command = ["-m", "megavar", "run", "--config", str(chosen.config), *chosen.overrides]

    def check() -> None:
        for flag in ("nodes", "time"):
            if getattr(chosen, flag) is not None:
                raise ValueError(f"--{flag} is for a cluster; name its settings with --executor, or leave it out.")
        if chosen.dry_run:
            ranks = load_config(chosen.config, chosen.overrides).parallel.least_ranks
            print(shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(ranks), *command]))

    code = reported(check)
    return code if code or chosen.dry_run else run_on_enough_ranks(chosen.config, chosen.overrides, command)


def _launch_job(chosen: argparse.Namespace) -> int:
    submitted: list[tuple[str, Path]] = []

    def work() -> None:
        settings = load_settings(SlurmSettings, _settings_file(chosen.executor))
        given = {"nodes": chosen.nodes, "time": chosen.time}
        settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
        config = load_config(chosen.config, chosen.overrides)
        show_logs(config.logging.level)
        check_job(config, settings)
        script = job_script(config, settings, chosen.config, chosen.overrides)
        if chosen.dry_run:
            print(script, end="")
            return
        folder = Run(config).folder
        job = jobs.submit(script, folder)
        print(f"job {job} is submitted as {jobs.script_of(folder)}; `megavar launch status {folder}` asks for it")
        submitted.append((job, folder))

    code = reported(work)
    if code or not (chosen.wait and submitted):
        return code
    ((job, folder),) = submitted
    return _follow(job, folder)


def _settings_file(name: str) -> Path:
    """The settings that `--executor` names."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else SETTINGS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(["local", *sorted(path.stem for path in SETTINGS.glob("*.yaml"))])
        raise ValueError(f"--executor {name}: there is no {file}; use one of {known}, or give a YAML file.")
    return file


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
        state = jobs.state_of(jobs.require_job(folder))
        print(state)
        log = jobs.rank_zero_log(folder)
        if log is not None:
            print(f"{log}:", *log.read_text(errors="replace").splitlines()[-TAIL_LINES:], sep="\n  ")
        codes.append(state.exit_code if state.is_over else 0)

    def cancel() -> None:
        job = jobs.require_job(folder)
        jobs.cancel(job)
        print(f"job {job} is told to stop; its ranks save if Slurm gives them the time (KillWait)")
        codes.append(0)

    code = reported(status if action == "status" else cancel)
    return code or codes[0]
