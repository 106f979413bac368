"""Two ranks, rank 0 works for three seconds, then fails: `waiting_worker.py OUT`."""

import sys
import time
from pathlib import Path

from megavar import ranks
from megavar.config.schema import ParallelConfig
from megavar.training import parallel


def fail() -> None:
    raise ValueError("the servers are gone")


def main() -> int:
    try:
        parallel.start(ParallelConfig())
        before, began = time.process_time(), time.monotonic()
        ranks.on_rank_zero(lambda: time.sleep(3))
        used, waited = time.process_time() - before, time.monotonic() - began
        if not ranks.is_rank_zero():
            Path(sys.argv[1]).write_text(f"{used} {waited}")
        ranks.on_rank_zero(fail)
    except Exception as error:
        return parallel.exit_code_for(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
