"""The main job: rounds of variational reasoning, from a Qwen checkpoint and questions to a better Qwen checkpoint.

    torchrun examples/pretrain_variational.py --tp 4 --pp 2
    torchrun --nproc-per-node 8 examples/pretrain_variational.py --config conf/qwen3_4b.yaml --tp 4 --sp

Without `--config` it runs the demo. If there are fewer ranks than the parallel layout needs, it starts them on this
machine. Stages that are finished are skipped, so the same command resumes an interrupted run. Flags and `key=value`
arguments override the configuration file.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from megavar.config.load import load_config
from megavar.launch.local import run_on_enough_ranks
from megavar.ranks import is_rank_zero

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "conf" / "demo.yaml"
LAYOUT_FLAGS = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "ep": "expert"}


def main() -> int:
    """Read the flags and run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO, help="YAML file of the run (default: the demo's)")
    for flag, size in LAYOUT_FLAGS.items():
        parser.add_argument(f"--{flag}", type=int, help=f"parallel.{size}")
    parser.add_argument("--sp", action="store_true", help="parallel.sequence=true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args()
    overrides = [
        f"parallel.{size}={getattr(chosen, flag)}"
        for flag, size in LAYOUT_FLAGS.items()
        if getattr(chosen, flag) is not None
    ]
    if chosen.sp:
        overrides.append("parallel.sequence=true")
    overrides += chosen.overrides
    if chosen.config.resolve() == DEMO and is_rank_zero() and not any(key.startswith("data.") for key in overrides):
        make_demo_questions()
    return run_on_enough_ranks(chosen.config, overrides, sys.argv)


def make_demo_questions() -> None:
    """Generate the demo's questions where they are missing."""
    data = load_config(DEMO, []).data
    train, held_out = Path(data.train), Path(data.eval or data.train)
    if not (train.is_file() and held_out.is_file()):
        generator = ROOT / "examples" / "data" / "generate.py"
        subprocess.run([sys.executable, str(generator), "--out", str(train.parent)], check=True)


if __name__ == "__main__":
    sys.exit(main())
