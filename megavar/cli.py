"""Command line: `megavar COMMAND ...`; a command is a stage, `run` for all of them, or one that looks at a run.

Libraries are imported when they are needed: a mistake in the configuration is reported before torch is imported, and
`report` and `show` never import it.
"""

import argparse
import errno
import io
import json
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megavar.liveness import another_rank_ended, leave_other_ranks, watch_other_ranks
from megavar.ranks import (
    ExplainedFailure,
    NodeFailure,
    RankZeroError,
    is_rank_zero,
    share_exit_code,
    wait_for_exit_code,
)
from megavar.rollout.watchdog import die_with_parent
from megavar.stopping import Stopped, catch_signals, release_signals

if TYPE_CHECKING:
    from megavar.config.schema import ParallelConfig, RunConfig
    from megavar.runs.plan import Stage

logger = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
LOST_PEER_SECONDS = 5.0
"""How long a rank that lost its connection to another one waits to hear whether that is dead."""
_LOST_CONNECTION = "connection"
"""In what torch says of it."""
ENDED_BY_READER = 128 + signal.SIGPIPE
"""Exit code when what reads the output has ended, as a shell has it for other programs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for a user's mistake, 75 if it was stopped, 1 for a failure, 141 if nobody reads its output.
    """
    try:
        code = _command(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return ENDED_BY_READER
    return code or (ENDED_BY_READER if _reader_is_gone() else 0)


def _command(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else 2
    if given[0] in LOOKING:
        return LOOKING[given[0]][1](given[1:])
    if _stage_of(given[0]) is None and given[0] != "run" and "--config" not in given:
        print(f"error: no command {given[0]!r}; `megavar --help` lists them", flush=True)
        return 2
    parser = _stage_parser(given[0])
    if given[0] == "eval":
        _add_models_and_suites(parser)
    chosen = parser.parse_intermixed_args(given[1:])
    if given[0] == "eval" and (chosen.model or chosen.suite or chosen.samples or chosen.k):
        return evaluate(chosen)
    if chosen.config is None:
        parser.error("the following arguments are required: --config")
    return launch(chosen.config, chosen.overrides, given[0])


def launch(config_file: Path, overrides: list[str], stage: str) -> int:
    """Load and check a configuration, then run a stage, `run` (all of them) or `selftest`; returns the exit code."""
    end_with_agent()
    return reported(lambda: _launch(config_file, overrides, stage))


def end_with_agent() -> None:
    """Let the kernel end this process when the agent that started it ends, however that goes.

    A rank that lives on would write beside the rerun. One that no agent started may outlive whatever started it.
    What this process forks ends with it in any case: Megatron forks the writers of a checkpoint, which would wait for a
    dead rank for ever (dist_checkpointing/strategies/filesystem_async.py, write_preloaded_data_multiproc).
    """
    global _forks_end_with_it
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if not _forks_end_with_it:
        os.register_at_fork(before=_note_parent, after_in_child=_end_with_parent)
        _forks_end_with_it = True


_forks_end_with_it = False
_parent = 0


def _note_parent() -> None:
    global _parent
    _parent = os.getpid()


def _end_with_parent() -> None:
    die_with_parent()
    if os.getppid() != _parent:  # it died before the kernel was asked
        os._exit(1)


def _launch(config_file: Path, overrides: list[str], stage: str) -> None:
    from megavar.config.load import load_config
    from megavar.runs.plan import find_stage

    config = load_config(config_file, overrides)
    show_logs(config.logging.level)
    if config.parallel.tensor > 1 or config.parallel.context > 1:
        # Up to Hopper, Megatron relies on it for transfers beside products (layers.py:526); CUDA reads it as it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    all_ranks = stage in ("run", "selftest") or find_stage(config, stage)[0].all_ranks
    if not (all_ranks or is_rank_zero()):
        return  # a stage of one process, started on several ranks
    ranks = world_size() if all_ranks else None
    if is_rank_zero():
        from megavar.stages.check import check_run

        check_run(config, ranks)  # the other ranks wait for rank 0 where they join the process group
    if stage == "run":
        run_all_stages(config)
        return
    if stage == "selftest":
        from megavar.stages.selftest import selftest as compare

        with _process_group(config.parallel):
            catch_signals()
            compare(config)
        return
    from megavar.stages.runner import run_stage

    with _process_group(config.parallel) if all_ranks else nullcontext():
        catch_signals()
        run_stage(config, stage)
    found = _stage_of(stage)
    if found is not None and found.name == "eval":
        from megavar.report.suites import FILE, print_results
        from megavar.runs.folder import Run

        if (Run(config).eval / FILE).exists():
            print_results(Run(config).eval)


def run_all_stages(config: "RunConfig") -> None:
    """Run a checked configuration on all ranks of this torchrun, then print the table of results."""
    from megavar.report.summary import print_summary
    from megavar.runs.folder import Run
    from megavar.stages.runner import run_pipeline

    with _process_group(config.parallel):
        catch_signals()  # not before all have joined: there is nothing to save then, and nobody to agree with
        run_pipeline(config)
        if is_rank_zero():
            print_summary(Run(config, config.rounds))


@contextmanager
def _process_group(config: "ParallelConfig") -> Iterator[None]:
    """Left in order only if nothing failed: the other ranks of a failed one do not answer."""
    from megavar.training import parallel

    parallel.start(config)
    watch_other_ranks()
    yield
    leave_other_ranks()
    parallel.stop()


def world_size() -> int:
    """Ranks that torchrun started.

    Raises:
        ValueError: if this process was not started by torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "this command trains or scores and runs under torchrun; start it with "
            "`torchrun --nproc-per-node N -m megavar ...` or `torchrun --nproc-per-node N examples/...`."
        )
    return int(os.environ["WORLD_SIZE"])


def show_logs(level: str) -> None:
    """Show our log lines; those of libraries, and their warnings, only at `debug`. Before they are imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if level == "info" else "%(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if level == "debug" else logging.ERROR)
    logging.getLogger("megavar").setLevel(logging.DEBUG if level == "debug" else logging.INFO)
    if level == "debug":
        return
    warnings.simplefilter("ignore")
    # For C++ code, for libraries that set up logging of their own, and for processes that this one spawns.
    for name, value in (
        ("PYTHONWARNINGS", "ignore"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)


def reported(work: Callable[[], None]) -> int:
    """Do the work and return the exit code; an error that all ranks share is printed once, by rank 0.

    A user's mistake (ValueError), an explained failure and a full disk are one line; anything else comes with its
    traceback. Whatever the umask, nobody else can write the files that the work makes.
    """
    os.umask(os.umask(0) | 0o022)  # which ranks, servers and workers inherit
    try:
        return _code_of(work)
    finally:
        leave_other_ranks()
        release_signals()


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`; then it goes nowhere from now on."""
    try:
        sys.stdout.flush()
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)  # errors are told unasked: here, that the pipe is broken
        if not any(event & select.POLLERR for _, event in output.poll(0)):
            return False
    except BrokenPipeError:
        pass
    except io.UnsupportedOperation:  # the output is caught in memory
        return False
    # Else Python writes the rest at its exit, and complains.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _code_of(work: Callable[[], None]) -> int:
    crashed = False
    try:
        work()
    except RankZeroError:
        return wait_for_exit_code()
    except Stopped as stopped:
        if not is_rank_zero():
            return wait_for_exit_code() or stopped.exit_code
        print(stopped, flush=True)
        code = stopped.exit_code
    except (ValueError, FloatingPointError, ExplainedFailure) as error:
        logger.debug("traceback of what follows:", exc_info=True)
        crashed = isinstance(error, NodeFailure)  # which no other rank reports
        if is_rank_zero() or crashed:
            print(f"error: {error}", flush=True)
        code = 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        if is_rank_zero():
            print("interrupted; the same command resumes", flush=True)
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return ENDED_BY_READER
        if _LOST_CONNECTION in str(error).lower() and another_rank_ended(LOST_PEER_SECONDS):
            return 1  # the rank that found it dead has said so
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}; free some space or mend the disk, then run the same command again")
        else:
            traceback.print_exception(error)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not have been imported
            print("error: out of GPU memory; see docs/troubleshooting.md#out-of-memory", flush=True)
        code, crashed = 1, True
    else:
        return 0
    if is_rank_zero() or crashed:  # of what all ranks share, rank 0 tells the others
        share_exit_code(code)
    return code


def _add_models_and_suites(parser: argparse.ArgumentParser) -> None:
    """What `eval` takes instead of a run."""
    group = parser.add_argument_group(
        "without a run", "any models on any question files, such as `megavar import` writes (docs/evaluation.md)"
    )
    group.add_argument("--model", type=Path, action="append", default=[], metavar="DIR", help="Hugging Face folder; "
                       "again for each further one, which is compared with those before")  # fmt: skip
    group.add_argument("--suite", nargs="+", action="extend", default=[], metavar="FILE", help="question files; "
                       "default: eval.suites")  # fmt: skip
    group.add_argument("--samples", type=int, metavar="N", help="samples of each question (eval.num_samples)")
    group.add_argument("--k", type=int, action="append", metavar="K", help="report pass@K (eval.pass_at)")
    group.add_argument("--out", type=Path, default=Path("runs") / "eval", metavar="FOLDER", help="where samples and "
                       "results go, and are added to (default: runs/eval)")  # fmt: skip


def evaluate(chosen: argparse.Namespace) -> int:
    """Have models answer suites without a run; `--config` may be any YAML with sections of one."""
    end_with_agent()
    files = [item for item in chosen.suite if "=" not in item or Path(item).exists()]
    overrides = chosen.overrides + [item for item in chosen.suite if item not in files]  # --suite takes what follows it
    shorthands = {"num_samples": chosen.samples, "pass_at": chosen.k, "suites": files or None}
    overrides += [f"eval.{key}={json.dumps(value)}" for key, value in shorthands.items() if value is not None]

    def work() -> None:
        from megavar.config.load import load_evaluation

        config = load_evaluation(chosen.config, overrides)
        show_logs(config.logging.level)
        from megavar.report.suites import print_results
        from megavar.stages.evaluation import evaluate as run_evaluation

        catch_signals()
        run_evaluation(chosen.model, config, chosen.out)
        print_results(chosen.out)

    return reported(work)


def report(arguments: Sequence[str]) -> int:
    """Write the page of a run or of an evaluation."""
    parser = argparse.ArgumentParser("megavar report", description="Write RUN/report/index.html and its figures.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/demo, or of an evaluation")
    parser.add_argument("others", type=Path, metavar="OTHER", nargs="*", help="runs to compare with in the curves")
    chosen = parser.parse_args(arguments)

    def work() -> None:
        from megavar.report.page import write_page

        page = write_page([chosen.run, *chosen.others])
        print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, with its figures as PNG files in the same folder")

    return reported(work)


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

        from megavar.report.show import show as print_records

        print_records(chosen.file, chosen.limit, chosen.question, chosen.model, Console())

    return reported(work)


def check(arguments: Sequence[str]) -> int:
    """Check a run and print what it will take."""
    parser = argparse.ArgumentParser(
        "megavar check", description="Check a run before it starts, and print its tokens, steps, memory and disk."
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--ranks", type=int, metavar="N", help="GPUs of the run (default: the fewest of its layout)")
    parser.add_argument(
        "--tokens-per-second", type=float, metavar="RATE", help="say how long the run takes at this rate"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)

    def work() -> None:
        from megavar.config.load import load_config
        from megavar.runs.reuse import forecast_reuse
        from megavar.stages.check import check_run

        if chosen.tokens_per_second is not None and not 0 < chosen.tokens_per_second < float("inf"):
            raise ValueError(f"--tokens-per-second={chosen.tokens_per_second} is not a rate; give a number above 0.")
        config = load_config(chosen.config, chosen.overrides)
        show_logs(config.logging.level)
        check_run(config, chosen.ranks or config.parallel.least_ranks).print(chosen.tokens_per_second)
        reused, obstacles = forecast_reuse(config)
        for source in dict.fromkeys(reused.values()):
            print(f"reused from {source}: {', '.join(name for name, other in reused.items() if other == source)}")
        for name, obstacle in obstacles.items():
            print(f"{name}: not reused: {obstacle}")

    return reported(work)


def selftest(arguments: Sequence[str]) -> int:
    """Compare the ways to the same numbers on the grid of a run."""
    parser = argparse.ArgumentParser(
        "megavar selftest",
        description="Before a run: score and train on some of its sequences on its grid, in several ways, with "
        "transformers and a server, and compare. Under torchrun, with the run's number of ranks.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)
    return launch(chosen.config, chosen.overrides, "selftest")


def export_traces(arguments: Sequence[str]) -> int:
    """Write a run's weighted traces for other trainers."""
    parser = argparse.ArgumentParser(
        "megavar export-traces",
        description="Write the weighted traces that a run's policy is trained on, for trainers elsewhere "
        "(docs/export.md).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/demo")
    parser.add_argument(
        "--format", required=True, choices=("messages", "sharegpt", "megatron"), help="messages and sharegpt are JSONL"
    )
    parser.add_argument(
        "--selection", choices=("weighted", "resample", "best"), help="instead of the run's objective.selection"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="default: RUN/export/FORMAT, with .jsonl or a folder"
    )
    chosen = parser.parse_args(arguments)

    def work() -> None:
        show_logs("info")
        from megavar.stages.export_traces import export_traces as write

        name = chosen.format if chosen.format == "megatron" else f"{chosen.format}.jsonl"
        target = chosen.output or chosen.run / "export" / name
        count = write(chosen.run, chosen.format, chosen.selection, target)
        print(f"{target}: {count:,} sequences")

    return reported(work)


def launch_command(arguments: Sequence[str]) -> int:
    """Start a run here or on a cluster."""
    from megavar.launch.command import main as launch_main

    return launch_main(arguments)


def import_published(arguments: Sequence[str]) -> int:
    """Write a question file of published data sets."""
    parser = argparse.ArgumentParser(
        "megavar import",
        description="Make a question file of published data sets as they were downloaded (docs/data.md). Every answer "
        "is judged by its verifier; rows that are left out are in OUT.rejected.jsonl, with the reason.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help=".jsonl, .json, .csv or .parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="question file to write")
    parser.add_argument("--layout", metavar="NAME", help="instead of the one that the columns say")
    parser.add_argument(
        "--map", metavar="FIELD=COLUMN,...", default="", help="columns of a layout that is not known, such as "
        "question=prompt,answer=label; COLUMN.KEY is inside an object"
    )  # fmt: skip
    parser.add_argument(
        "--trace-markers", nargs=2, metavar=("BEFORE", "BEHIND"), help="of the trace in a mapped solution, if they are "
        "not <think> </think>"
    )  # fmt: skip
    parser.add_argument("--max-trace-tokens", type=int, metavar="N", help="leave out longer traces")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder whose tokenizer counts these tokens")
    parser.add_argument(
        "--exclude", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="held-out questions, in "
        "any layout: the same ones, and those with 13 words in a row in common, are left out"
    )  # fmt: skip
    chosen = parser.parse_args(arguments)

    def work() -> None:
        show_logs("info")
        from megavar.stages.import_questions import ImportSettings, import_questions

        pairs = [pair.partition("=") for pair in chosen.map.split(",") if pair]
        if any(not column for _, _, column in pairs):
            raise ValueError(f"--map {chosen.map}: give FIELD=COLUMN,..., such as question=prompt,answer=label.")
        import_questions(
            chosen.files,
            chosen.out,
            ImportSettings(
                layout=chosen.layout,
                columns={name.strip(): column.strip() for name, _, column in pairs},
                markers=None if chosen.trace_markers is None else tuple(chosen.trace_markers),
                exclude=chosen.exclude,
                max_trace_tokens=chosen.max_trace_tokens,
                model=chosen.model,
            ),
        )

    return reported(work)


LOOKING: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "check": ("check a run before it starts, its data and model too, and print what it will take", check),
    "export-traces": ("write a run's weighted traces for trainers elsewhere", export_traces),
    "launch": ("start a run here or as a job of a cluster; ask for the job, or cancel it", launch_command),
    "import": ("make a question file of published data sets", import_published),
    "report": ("write a run's results, figures and traces as one HTML page", report),
    "selftest": ("compare, on a run's grid, the ways to the same numbers; before it starts", selftest),
    "show": ("print records of a run", show),
}
"""Commands that are no stages: what they do, and the function that does it."""


def _help() -> str:
    from megavar.runs.plan import STAGES

    rows = [
        ("run", "all stages of a run that are not finished"),
        *((stage.name, stage.summary) for stage in STAGES),
        *((name, summary) for name, (summary, _) in LOOKING.items()),
    ]
    commands = "\n".join(f"  {name:<13} {summary}" for name, summary in rows)
    return (
        "usage: megavar COMMAND --config FILE [key=value ...]\n"
        "       megavar eval --model DIR [--model DIR ...] --suite FILE [FILE ...]\n"
        "       megavar report RUN [RUN ...] | show FILE | launch status RUN | launch cancel RUN\n\n"
        f"commands:\n{commands}\n\n"
        "Stages of later rounds are named sample_02 and so on. `run` and the stages that train or score start under\n"
        "torchrun: torchrun --nproc-per-node N -m megavar run --config FILE. `megavar COMMAND --help` says more."
    )


def _stage_of(command: str) -> "Stage | None":
    """The stage that a command such as `policy_02` names."""
    from megavar.runs.plan import STAGES

    return {stage.name: stage for stage in STAGES}.get(re.sub(r"_\d+$", "", command))


def _stage_parser(command: str) -> argparse.ArgumentParser:
    stage = _stage_of(command)
    if stage is None:
        description = "Run all stages that are not finished, in order, then print the table of results."
    else:
        ranks = "under torchrun, on all ranks" if stage.all_ranks else "in one process"
        description = f"{stage.summary}\n\nreads:   {stage.reads}\nwrites:  {stage.writes}\nruns:    {ranks}"
    parser = argparse.ArgumentParser(
        f"megavar {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=command != "eval", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    return parser


if __name__ == "__main__":
    sys.exit(main())
