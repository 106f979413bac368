"""Starts gloo ranks without torchrun: forked from one process that has imported torch and megatron.

Importing them takes longer than what most tests do then. That torchrun starts ranks is seen by `tests/integration`.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.multiprocessing import start_processes

LIMIT_SECONDS = 600
forked = multiprocessing.get_context("forkserver")
"""Starts processes that have imported torch and megatron."""
forked.set_forkserver_preload(["megavar.training.loop", "megavar.training.scorer"])


def run_ranks(num_ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)`, a function that can be pickled, on that many ranks.

    Raises:
        ProcessRaisedException: with the traceback of the first rank that failed; the others are ended.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    started = time.monotonic()
    ranks = start_processes(
        _rank, (num_ranks, store.port, work, arguments), num_ranks, False, start_method="forkserver"
    )
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() - started < LIMIT_SECONDS, f"{num_ranks} ranks still ran after {LIMIT_SECONDS} s"
    finally:
        for process in ranks.processes:
            process.kill()


def _rank(rank: int, num_ranks: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "localhost"}
    # The store exists already, as it does under torchrun.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    work(*arguments)
