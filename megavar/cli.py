"""Command line: `python -m megavar STAGE --config FILE [key=value ...]`; STAGE is one stage, or `run` for all.

Stages that train or score run under torchrun. Two commands only look, and need no torch: `report RUN ...` and
`show FILE`. Heavy imports happen after the arguments are read.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

HELP = """stages: run (all), sft, rollouts, posterior, sample, verify, score, weigh, policy, export, eval;
those of later rounds: sample_02 and so on;
to look at a run: report RUN [RUN ...], show FILE (each has its own --help)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage or command; returns the exit code: 0, 2 for a user's mistake, 1 for a failure."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        return COMMANDS[given[0]](given[1:])
    parser = argparse.ArgumentParser("megavar", description=__doc__, epilog=HELP)
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(given)
    return launch(chosen.config, chosen.overrides, chosen.stage)


def launch(config_file: Path, overrides: list[str], stage: str) -> int:
    """Load and check a run's configuration, then run a stage or, for `run`, all of them."""
    from megavar.training import parallel

    logging.basicConfig(format="%(message)s")
    logging.getLogger("megavar").setLevel(logging.INFO)
    try:
        from megavar.config.load import load_config
        from megavar.stages import check, pipeline, plan

        config = load_config(config_file, overrides)
        distributed = stage == "run" or plan.needs_every_rank(stage)
        check.check_run(config, parallel.world_size() if distributed else None)
        if distributed:
            parallel.start(config.parallel)
        if stage == "run":
            pipeline.run_pipeline(config)
        else:
            pipeline.run_stage(config, stage)
        parallel.stop()
    except (Exception, KeyboardInterrupt) as error:
        return parallel.exit_code_for(error)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write the page of a run."""
    parser = argparse.ArgumentParser("megavar report", description="Write RUN/report/index.html and its figures.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    parser.add_argument("others", type=Path, metavar="OTHER", nargs="*", help="runs drawn beside it in the curves")
    chosen = parser.parse_args(arguments)

    def work() -> None:
        from megavar.stages.page import write_page

        page = write_page([chosen.run, *chosen.others])
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, and its figures as PNG files beside it")

    return _look(work)


def show(arguments: Sequence[str]) -> int:
    """Print records."""
    parser = argparse.ArgumentParser("megavar show", description="Print records as a person reads them.")
    parser.add_argument("file", type=Path, metavar="FILE", help="Parquet or JSONL file, or a stage's folder")
    parser.add_argument("--limit", type=int, default=10, metavar="N", help="first N records (default: 10)")
    parser.add_argument("--question", metavar="ID", help="all records of this question")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder whose tokenizer turns ids into text")
    chosen = parser.parse_args(arguments)

    def work() -> None:
        from rich.console import Console

        from megavar.stages.show import show as print_records

        print_records(chosen.file, chosen.limit, chosen.question, chosen.model, Console())

    return _look(work)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"report": report, "show": show}
"""What is no stage: its arguments -> exit code."""


def _look(work: Callable[[], None]) -> int:
    """As `launch` reports errors, without importing the training engine."""
    try:
        work()
    except ValueError as error:
        print(f"error: {error}", flush=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exception(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
