"""One node's part of a Slurm job: `srun` starts this once on every node, and it starts the node's ranks."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megavar.cli import end_with_agent, reported, show_logs
from megavar.config.load import load_config
from megavar.config.schema import RunConfig
from megavar.stopping import RUN_AGAIN, SIGNALS

EXIT_CODE_FILE = "exit_code"
"""In the attempt's folder of logs: exit code of the node that failed or stopped first, which is why the others did."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages on this node's ranks; returns the exit code of `start_ranks`."""
    for number in SIGNALS:  # until the agent has its own
        signal.signal(number, _stop_before_start)
    parser = argparse.ArgumentParser("python -m megavar.launch.node", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True, help="of this node")
    parser.add_argument("--logs", type=Path, required=True, help="folder of this attempt's logs")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)
    code = _run_node(chosen.config, chosen.overrides, chosen.ranks)
    if code:
        try:
            with (chosen.logs / EXIT_CODE_FILE).open("x") as file:
                file.write(f"{code}\n")
        except FileExistsError:
            pass  # another node was first
    return code


def _run_node(config_file: Path, overrides: list[str], num_ranks: int) -> int:
    end_with_agent()
    configs: list[RunConfig] = []
    code = reported(lambda: configs.append(load_config(config_file, overrides)))
    if code:
        return code
    (config,) = configs
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it then
    show_logs(config.logging.level)

    from megavar.launch.agent import Nodes, import_for_forks, start_run
    from megavar.rollout.sglang_servers import visible_gpus
    from megavar.stages.check import check_run

    nodes = Nodes(
        number=int(os.environ["SLURM_NNODES"]),
        node=int(os.environ["SLURM_NODEID"]),
        store=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        job=f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
    )
    forks = not visible_gpus()

    def prepare() -> None:
        if not forks:
            return  # rank 0 checks
        if nodes.node == 0:
            check_run(config, nodes.number * num_ranks)
        import_for_forks()

    code = reported(prepare)
    if code:
        return code
    command = ["-m", "megavar", "run", "--config", str(config_file), *overrides]
    return start_run(config, command, num_ranks, forks, nodes)


def _stop_before_start(_number: int, _frame: FrameType | None) -> None:
    sys.exit(RUN_AGAIN)


if __name__ == "__main__":
    sys.exit(main())
