"""The main job: one round of variational reasoning, from a Qwen checkpoint and questions to a better Qwen checkpoint.

    torchrun --nproc-per-node 4 examples/pretrain_variational.py --config conf/demo.yaml --tp 2 --pp 2

Every stage that is finished is skipped, so the same command resumes an interrupted run. Flags and `key=value`
arguments override the configuration file.
"""

import argparse
import sys
from pathlib import Path

from megavar.cli import launch

GRID_FLAGS = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert"}


def main() -> int:
    """Read the flags and run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    for flag, size in GRID_FLAGS.items():
        parser.add_argument(f"--{flag}", type=int, help=f"parallel.{size}")
    parser.add_argument("--sp", action="store_true", help="parallel.sequence=true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args()
    overrides = [
        f"parallel.{size}={getattr(chosen, flag)}"
        for flag, size in GRID_FLAGS.items()
        if getattr(chosen, flag) is not None
    ]
    if chosen.sp:
        overrides.append("parallel.sequence=true")
    return launch(chosen.config, overrides + chosen.overrides, "run")


if __name__ == "__main__":
    sys.exit(main())
