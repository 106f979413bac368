"""Starts a run on this machine with as many ranks as its parallel layout needs."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from megavar.cli import end_with_agent, launch, reported, show_logs
from megavar.config.load import load_config
from megavar.config.schema import ParallelConfig, RunConfig
from megavar.launch.agent import import_for_forks, start_run
from megavar.ranks import is_rank_zero
from megavar.rollout.sglang_servers import visible_gpus
from megavar.stages.check import check_run


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
    return start_run(config, command, num_ranks, forks)


def _check(config: RunConfig, command: Sequence[str], forks: bool) -> None:
    """Refuse what is wrong with the run, and import what forked ranks share: most of the time to the first step.

    A rank that is not forked checks and imports by itself: where there are GPUs, a process that has looked for them
    cannot use them after a fork.
    """
    _check_machine(config.parallel, command)
    if forks and is_rank_zero():
        check_run(config, config.parallel.least_ranks)
        import_for_forks()


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
