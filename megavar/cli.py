"""Command line: `python -m megavar STAGE --config FILE [key=value ...]`; STAGE is one stage, or `run` for all.

Stages that train or score run under torchrun. Heavy imports happen after the arguments are read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """stages: run (all), sft, rollouts, posterior, sample, verify, score, weigh, policy, export, eval;
those of later rounds: sample_02 and so on"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, 2 for a user's mistake, 1 for a failure."""
    parser = argparse.ArgumentParser("megavar", description=__doc__, epilog=HELP)
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values to change")
    chosen = parser.parse_intermixed_args(arguments)
    return launch(chosen.config, chosen.overrides, chosen.stage)


def launch(config_file: Path, overrides: list[str], stage: str) -> int:
    """Load and check a run's configuration, then run a stage or, for `run`, all of them."""
    from megavar.training import parallel

    try:
        from megavar.config.load import load_config
        from megavar.stages import check, pipeline

        config = load_config(config_file, overrides)
        distributed = stage == "run" or pipeline.needs_every_rank(stage)
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


if __name__ == "__main__":
    sys.exit(main())
