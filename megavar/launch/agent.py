"""torchrun's agent in this process: starts the ranks of one node and returns their exit code."""

import importlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megavar.cli import end_with_agent, reported, run_all_stages
from megavar.config.schema import RunConfig
from megavar.ranks import environment_without_torchrun
from megavar.stopping import INTERRUPTED, RUN_AGAIN, SIGNALS

MISTAKE = 2
"""Exit code of a user's mistake, which rank 0 has reported."""
STOP_LIMIT_SECONDS = 600
"""For ranks that were asked to stop, before they are killed."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, each with one agent; they meet at the first one."""

    number: int
    node: int
    """This one, from 0."""
    store: str
    """HOST:PORT on the first node, whose agent listens there."""
    job: str
    """The same on all nodes, another one at each start."""


def start_run(
    config: RunConfig, command: Sequence[str], num_ranks: int, forks: bool, nodes: Nodes | None = None
) -> int:
    """Run all stages of a checked run on this many ranks of this node; returns the exit code, as `start_ranks` does.

    Args:
        command: module or script with its arguments, which a rank that is not forked executes.
        forks: ranks are forked from this process, which has called `import_for_forks`.
    """
    if forks:
        return start_ranks(num_ranks, nodes, _run_forked, config)
    return start_ranks(num_ranks, nodes, sys.executable, "-u", *command)


def import_for_forks() -> None:
    """Import what forked ranks share: most of the time to the first step.

    Where there are GPUs, a process that has looked for them cannot use them after a fork.
    """
    importlib.import_module("megavar.training.loop")


def _run_forked(config: RunConfig) -> None:
    # A forked rank has the agent's handlers, which would end it with a traceback.
    for number in (*SIGNALS, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    end_with_agent()
    code = reported(lambda: run_all_stages(config))
    if code:
        sys.exit(code)


def start_ranks(num_ranks: int, nodes: Nodes | None, entrypoint: Callable[..., None] | str, *arguments: Any) -> int:
    """Run a function, or a program, on this many ranks of this node under torchrun's agent, until all have ended.

    torchrun's own report of a failure is left out, but at logging.level=debug: the rank that failed has said why.

    Args:
        nodes: of a job with an agent on each; None: there is this node only.
        entrypoint: a function, whose ranks are forked from this process, or the path of a program.

    Returns:
        0, or 2 if a rank ended with a user's mistake, 75 or 130 if the ranks were asked to stop, 75, too, if the port
        where nodes meet was taken, 1 for any other failure.
    """
    from torch.distributed import DistNetworkError
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
        min_nodes=nodes.number if nodes else 1,
        max_nodes=nodes.number if nodes else 1,
        nproc_per_node=num_ranks,
        run_id=nodes.job if nodes else uuid.uuid4().hex,
        # Static: the first node has rank 0. With c10d it is the node that comes first.
        rdzv_backend="static" if nodes else "c10d",
        rdzv_endpoint=nodes.store if nodes else "localhost:0",
        rdzv_configs={"rank": nodes.node} if nodes else {},
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
    except DistNetworkError as error:
        if nodes is None or "EADDRINUSE" not in str(error):
            raise
        print(
            f"error: {nodes.store}: another process has taken the port; the next start chooses another one", flush=True
        )
        return RUN_AGAIN
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval == signal.SIGINT else RUN_AGAIN
    return 0
