"""Starts a run on this machine with as many ranks as its parallel layout needs."""

import importlib
import logging
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megavar.cli import end_with_agent, launch, reported, run_all_stages, show_logs
from megavar.config.load import load_config
from megavar.config.schema import ParallelConfig, RunConfig
from megavar.ranks import environment_without_torchrun, is_rank_zero
from megavar.rollout.sglang_servers import visible_gpus
from megavar.stages.check import check_run
from megavar.stopping import INTERRUPTED, RUN_AGAIN, SIGNALS

MISTAKE = 2
"""Exit code of a user's mistake, which rank 0 has reported."""
STOP_LIMIT_SECONDS = 600
"""For ranks that were asked to stop, before they are killed."""


def run_on_enough_ranks(config_file: Path, overrides: list[str], command: Sequence[str]) -> int:
    """Run all stages of a run, first starting `command` again under torchrun if there are too few ranks.

    Args:
        command: script and arguments that call this function with the same configuration.

    Returns:
        The exit code: 0, 2 for a user's mistake, 75 if the run was stopped (130 by Ctrl-C), 1 for a failure.
    """
    end_with_agent()
    configs: list[RunConfig] = []
    code = reported(lambda: configs.append(load_config(config_file, overrides)))
    if code:
        return code
    (config,) = configs
    if int(os.environ.get("WORLD_SIZE", "0")) >= config.parallel.least_ranks:
        return launch(config_file, overrides, "run")
    # As torchrun does for several ranks; before torch is imported, which reads it then.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    show_logs(config.logging.level)
    forks = not visible_gpus()
    code = reported(lambda: _check(config, command, forks))
    if code or not is_rank_zero():
        return code
    layout, num_ranks = config.parallel, config.parallel.least_ranks
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}"
    sizes += f", expert {layout.expert}," if layout.expert > 1 else ""
    started = os.environ.get("WORLD_SIZE", "none")
    print(f"{sizes} needs {num_ranks} ranks, torchrun started {started}: starting {num_ranks} here", flush=True)
    if forks:
        return start_ranks(num_ranks, _run_forked, config)
    return start_ranks(num_ranks, sys.executable, "-u", *command)


def _check(config: RunConfig, command: Sequence[str], forks: bool) -> None:
    """Refuse what is wrong with the run, and import what forked ranks share: most of the time to the first step.

    A rank that is not forked checks and imports by itself: where there are GPUs, a process that has looked for them
    cannot use them after a fork.
    """
    _check_machine(config.parallel, command)
    if forks and is_rank_zero():
        check_run(config, config.parallel.least_ranks)
        importlib.import_module("megavar.training.loop")


def _run_forked(config: RunConfig) -> None:
    # A forked rank has the agent's handlers, which would end it with a traceback.
    for number in (*SIGNALS, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    end_with_agent()
    code = reported(lambda: run_all_stages(config))
    if code:
        sys.exit(code)


def _check_machine(layout: ParallelConfig, command: Sequence[str]) -> None:
    """Refuse what starting more ranks on this machine cannot mend.

    Raises:
        ValueError: if there are several nodes, with the command that would do, or too few GPUs, with both numbers.
    """
    needed, nodes = layout.least_ranks, int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if nodes > 1:
        ranks_a_node = -(-needed // nodes)
        raise ValueError(
            f"the parallel layout needs {needed} ranks, {nodes} nodes started {os.environ['WORLD_SIZE']}; on every "
            f"node run torchrun --nnodes {nodes} --nproc-per-node {ranks_a_node} --rdzv-backend c10d --rdzv-endpoint "
            f"{os.environ.get('MASTER_ADDR', 'HOST')}:29500 {shlex.join(command)}"
        )
    gpus = visible_gpus()
    if 0 < len(gpus) < needed:
        raise ValueError(
            f"the parallel layout needs {needed} GPUs, one a rank, and this machine has {len(gpus)}; choose smaller "
            "--tp, --pp or --cp, or start on several nodes."
        )


def start_ranks(num_ranks: int, entrypoint: Callable[..., None] | str, *arguments: Any) -> int:
    """Run a function, or a program, on this many ranks under torchrun's agent in this process, until all have ended.

    torchrun's own report of a failure is left out, but at logging.level=debug: the rank that failed has said why.

    Args:
        entrypoint: a function, whose ranks are forked from this process, or the path of a program.

    Returns:
        0, or 2 if a rank ended with a user's mistake, 75 or 130 if the ranks were asked to stop, 1 for any other
        failure.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    clean = environment_without_torchrun()
    for name in os.environ.keys() - clean.keys():
        del os.environ[name]
    if logging.getLogger("megavar").level > logging.DEBUG:
        for name in ("torch.distributed.elastic", "torch.multiprocessing"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else a folder in /tmp stays behind
        signals_to_handle=",".join(number.name for number in (*SIGNALS, signal.SIGQUIT)),
    )
    # A rank stops after its step, which may take longer than the agent's 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_LIMIT_SECONDS))
    try:
        elastic_launch(config, entrypoint)(*arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (MISTAKE, RUN_AGAIN, INTERRUPTED) if code in codes), 1)
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval == signal.SIGINT else RUN_AGAIN
    return 0
