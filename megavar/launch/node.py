"""One node's part of a job: `srun`, or another executor, starts this on every node, and it starts the node's ranks."""

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
    parser.add_argument("--logs", type=Path, help="folder of this attempt's logs; of a Slurm job only, which has nodes")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)
    code = _run_node(chosen.config, chosen.overrides, chosen.ranks, in_slurm=chosen.logs is not None)
    if code and chosen.logs is not None:
        try:
            with (chosen.logs / EXIT_CODE_FILE).open("x") as file:
                file.write(f"{code}\n")
        except FileExistsError:
            pass  # another node was first
    return code


def _run_node(config_file: Path, overrides: list[str], num_ranks: int, in_slurm: bool) -> int:
    end_with_agent()
    configs: list[RunConfig] = []
    code = reported(lambda: configs.append(load_config(config_file, overrides)))
    if code:
        return code
    (config,) = configs
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it then
    show_logs(config.logging.level)

    from megavar.launch.agent import Nodes, import_for_forks, start_run
    from megavar.rollout.sglang_servers import check_interpreter, visible_gpus
    from megavar.stages.check import check_run

    nodes = (
        Nodes(
            number=int(os.environ["SLURM_NNODES"]),
            node=int(os.environ["SLURM_NODEID"]),
            store=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            job=f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
        )
        if in_slurm
        else None
    )
    forks = not visible_gpus()

    def prepare() -> None:
        if nodes is not None and config.rollout.mode == "managed":
            try:
                check_interpreter(config.rollout.python)
            except ValueError as error:
                raise ValueError(f"node {os.environ['SLURMD_NODENAME']}: {error}") from error
        if not forks:
            return  # rank 0 checks
        if nodes is None or nodes.node == 0:
            check_run(config, (nodes.number if nodes else 1) * num_ranks)
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
