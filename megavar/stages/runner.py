"""Runs the stages of a run in order, each once: what is finished is skipped, and so is what another run has.

Every rank calls every stage: training and scoring use all ranks, sampling and verifying the first rank of every node,
the rest runs on rank 0 while the others wait. A
stage's module, and with it the libraries it needs, is imported when the stage runs.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from megavar.config.schema import RunConfig
from megavar.disk import atomic_write
from megavar.ranks import barrier, from_rank_zero, is_rank_zero, leads_node, num_nodes, on_every_node, on_rank_zero
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.owner import owned
from megavar.runs.plan import Stage, check_outputs, find_stage, stages_of
from megavar.runs.reuse import clear_aside, forecast_reuse, reuse_stage
from megavar.stopping import stop_if_requested

LATE_SECONDS = 60.0
"""How long a node may take to see a file that another one wrote."""


def run_pipeline(config: RunConfig) -> None:
    """Run every stage that is not finished."""
    _run_stages(config, stages_of(config))


def run_stage(config: RunConfig, name: str) -> None:
    """Run one stage, such as `policy`, or `policy_02` for that of the second round; those it reads must be finished.

    Raises:
        ValueError: for an unknown stage, or one that this configuration has no use for, or if existing outputs of the
            run were produced under other settings.
    """
    _run_stages(config, [find_stage(config, name)])


def _run_stages(config: RunConfig, stages: list[tuple[Stage, Run]]) -> None:
    with ExitStack() as ownership:

        def prepare() -> None:
            ownership.enter_context(owned(Run(config).folder))
            check_outputs(config)
            clear_aside(Run(config).folder)
            Run(config).open()

        on_rank_zero(prepare)
        _check_shared(Run(config).folder)
        _run_in_order(config, stages)


def _check_shared(folder: Path) -> None:
    """Every node must see what rank 0 writes into the run's folder.

    Raises:
        NodeFailure: on a node that does not.
    """
    if num_nodes() == 1:
        return
    file = folder / ".seen_by_all"
    written = from_rank_zero(lambda: f"{os.getpid()} {time.time_ns()}")
    on_rank_zero(lambda: _put(file, written))

    def look() -> None:
        until = time.monotonic() + LATE_SECONDS
        while not (file.is_file() and file.read_text() == written):
            if time.monotonic() > until:
                raise ValueError(
                    f"does not see what rank 0 wrote into {file} {LATE_SECONDS:.0f} s ago; runs_dir must be a folder "
                    "that all nodes share."
                )
            with suppress(OSError):
                os.listdir(folder)  # a network file system may look again
            time.sleep(0.5)

    on_every_node(look)


def _put(file: Path, text: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(text)


def _run_in_order(config: RunConfig, stages: list[tuple[Stage, Run]]) -> None:
    service = RolloutService(config.rollout, Run(config).base, Run(config).folder / "servers")
    done = from_rank_zero(lambda: _done(config))
    pending = [(stage, run) for stage, run in stages if run.entry(stage.name) not in done]
    try:
        for stage, run in stages:
            if (stage, run) in pending:
                pending.remove((stage, run))
                if pending and pending[0][0].serves and leads_node():
                    service.start_early()
            run_once(run, stage, partial(_execute, run, stage, service))
            service.end_stage()
            if not any(later.serves for later, _ in pending):
                service.close()
    finally:
        service.close()


def _done(config: RunConfig) -> set[str]:
    """The stages that need not be run, by what is known now: finished here, or in a run that is reused."""
    entries = Manifest(Run(config).folder).entries()
    reused, _ = forecast_reuse(config)
    return {name for name, entry in entries.items() if entry["status"] == "finished"} | reused.keys()


def run_once(run: Run, stage: Stage, work: Callable[[], None]) -> None:
    """Do a stage's work unless it is finished under these settings, here or in a run that is reused.

    Every rank calls it; rank 0 reads the manifests.

    Raises:
        ValueError: if it was started under other settings, or files of an earlier stage that it reads were changed.
    """
    manifest, name = Manifest(run.folder), run.entry(stage.name)

    def begin() -> bool:
        stop_if_requested(f"all stages before {name} are finished")
        settings = stage.settings(run)
        if manifest.check(name, settings):
            print(f"{name}: finished, skipped", flush=True)
            return False
        if reuse_stage(run, stage, settings, partial(_conclude, run, stage)):
            return False
        for entry in stage.inputs(run).values():
            manifest.check_outputs(entry)
        manifest.begin(name, settings)
        return True

    if not from_rank_zero(begin):
        return
    started = time.monotonic()
    work()
    barrier()
    if is_rank_zero():
        manifest.finish(name, time.monotonic() - started, stage.outputs(run))


def _conclude(run: Run, stage: Stage) -> None:
    if stage.concludes:
        import_module(f"megavar.stages.{stage.name}").conclude(run)


def _execute(run: Run, stage: Stage, service: RolloutService) -> None:
    if is_rank_zero():
        print(f"{run.entry(stage.name)}: {stage.summary}", flush=True)
    import_module(f"megavar.stages.{stage.name}").execute(run, service)
