"""What the ranks of one torchrun say to each other besides Megatron's collectives. Imports no torch by itself.

Rank 0 does what needs one process: it talks to servers, reads and writes records, shows progress. A process that
torchrun did not start is the only rank.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

_WAIT_SECONDS = 2.0
"""Of one wait, in which a process does not see signals."""
_REPORT_SECONDS = 60.0
"""Limit of waiting for rank 0 to report an error."""
RUN_ENDED = "megavar/exit_code"
"""Key of the store: the exit code of the rank that ended the run before its time."""
_num_calls = 0

Value = TypeVar("Value")


class RankZeroError(RuntimeError):
    """Raised on the other ranks when rank 0's work failed; rank 0 reports the cause."""


class ExplainedFailure(RuntimeError):
    """A failure that its message explains, so that it is reported as one line without a traceback."""


def distributed() -> Any:
    """torch.distributed, if this process has joined a process group; else None."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None


def is_rank_zero() -> bool:
    """Whether this process writes files, shows progress and talks to servers."""
    return rank() == 0


def rank() -> int:
    """Number of this process among those of this torchrun, from 0."""
    dist = distributed()
    return int(os.environ.get("RANK", "0")) if dist is None else int(dist.get_rank())


def barrier() -> None:
    """Wait for every rank; for short waits only."""
    dist = distributed()
    if dist is not None:
        dist.barrier()


def on_rank_zero(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the other ranks sleep, however long it takes; a failure fails every rank.

    Waiting goes through the rendezvous store, so it neither burns a core nor meets the time-out of a collective.

    Raises:
        RankZeroError: on the other ranks, if `work` failed.
    """
    global _num_calls
    dist = distributed()
    if dist is None:
        work()
        return
    store = dist.distributed_c10d._get_default_store()
    _num_calls += 1
    key = f"megavar/rank_zero/{_num_calls}"
    if dist.get_rank() == 0:
        try:
            work()
        except BaseException as error:
            store.set(key, f"{type(error).__name__}: {error}")
            raise
        store.set(key, "done")
        return
    while not _has(store, key):
        pass
    outcome = store.get(key).decode()
    if outcome != "done":
        raise RankZeroError(f"rank 0 failed: {outcome}")


def _has(store: Any, key: str) -> bool:
    """Whether the key is set, after waiting for it for a while; a store raises when the while is over."""
    try:
        store.wait([key], timedelta(seconds=_WAIT_SECONDS))
    except RuntimeError:
        return bool(store.check([key]))  # raises where it was not the time-out but the store that ended
    return True


def share_exit_code(code: int) -> None:
    """Once this rank has reported an error and cleaned up: let the other ranks end too, with the same code."""
    dist = distributed()
    if dist is not None:
        dist.distributed_c10d._get_default_store().set(RUN_ENDED, str(code))


def wait_for_exit_code() -> int:
    """The other ranks, after a `RankZeroError` or a stop: wait until rank 0 has reported it.

    A rank that ends earlier makes torchrun terminate rank 0 while it still stops its servers, before it has said why.
    """
    dist = distributed()
    if dist is None:
        return 1
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait([RUN_ENDED], timedelta(seconds=_REPORT_SECONDS))
        return int(store.get(RUN_ENDED))
    except RuntimeError:  # rank 0 is gone, or hangs
        return 1


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """What `make` returns on rank 0, on every rank (pickled); a failure fails every rank."""
    values: list[Any] = [None]

    def work() -> None:
        values[0] = make()

    on_rank_zero(work)
    dist = distributed()
    if dist is not None and dist.get_world_size() > 1:
        dist.broadcast_object_list(values)
    value: Value = values[0]
    return value


def process_exists(pid: int) -> bool:
    """Whether a process of this machine has this id; one that has ended and was not waited for does not count."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except (PermissionError, FileNotFoundError):  # another user's; a system without /proc
        return True


def environment_without_torchrun() -> dict[str, str]:
    """This process's environment without what torchrun set up for its ranks."""
    of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_", "PET_")
    return {
        name: value for name, value in os.environ.items() if name not in of_torchrun and not name.startswith(prefixes)
    }
