"""What the ranks of one torchrun say to each other besides Megatron's collectives. Imports no torch by itself.

Rank 0 does what needs one process: it reads and merges records, shows progress. The first rank of every node talks to
the node's servers and verifies answers. A process that torchrun did not start is the only rank.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

_WAIT_SECONDS = 2.0
"""Of one wait, in which a process does not see signals."""
_TELL_SECONDS = 1.0
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


class NodeFailure(ExplainedFailure):
    """The work of one node failed; the rank that did it reports it."""


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


def node() -> int:
    """Number of this process's node among those of this torchrun, from 0; rank 0 is on the first."""
    return int(os.environ.get("GROUP_RANK", "0"))


def leads_node() -> bool:
    """Whether this process is the first rank of its node."""
    return rank() == 0 if num_nodes() == 1 else os.environ["LOCAL_RANK"] == "0"


def num_nodes() -> int:
    """Nodes of this torchrun: agents, several of which may be on one machine."""
    return 1 if distributed() is None else int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def on_every_node(work: Callable[[], None]) -> None:
    """Run `work` on the first rank of every node while the others sleep; returns once all nodes are done.

    Raises:
        NodeFailure: on the first rank of a node whose `work` failed as its message explains.
        RankZeroError: on the other ranks, if `work` failed on a node.
    """
    global _num_calls
    if num_nodes() == 1:
        on_rank_zero(work)
        return
    store = distributed().distributed_c10d._get_default_store()
    _num_calls += 1
    key = f"megavar/node/{_num_calls}"
    if leads_node():
        try:
            work()
        except BaseException as error:
            store.set(f"{key}/{node()}", f"{type(error).__name__}: {error}")
            if isinstance(error, (ValueError, ExplainedFailure)):
                raise NodeFailure(f"node {node()} ({socket.gethostname()}): {error}") from error
            raise
        store.set(f"{key}/{node()}", "done")
    for other in range(num_nodes()):
        while not _has(store, f"{key}/{other}"):
            pass
        outcome = store.get(f"{key}/{other}").decode()
        if outcome != "done":
            raise RankZeroError(f"node {other} failed: {outcome}")


def claimed(blocks: Iterable[Value], name: str) -> Iterator[Value]:
    """The blocks that fall to this node: each goes to the node that asks first, when it has use for it.

    Args:
        blocks: the same on every node.
        name: of the blocks, once in a run of this process.
    """
    if num_nodes() == 1:
        yield from blocks
        return
    store = distributed().distributed_c10d._get_default_store()
    key = f"megavar/claims/{name}"
    mine = store.add(key, 1) - 1
    for number, block in enumerate(blocks):
        if number == mine:
            yield block
            mine = store.add(key, 1) - 1


class Tally:
    """A number that is added up over the nodes; each tells of its part every second.

    Args:
        name: once in a run of this process.
    """

    def __init__(self, name: str) -> None:
        self._key, self._untold, self._others, self._told_at = f"megavar/tally/{name}", 0, 0, time.monotonic()

    def add(self, number: int) -> int:
        """Add to it; returns what is known of the sum."""
        self._untold += number
        if time.monotonic() - self._told_at > _TELL_SECONDS:
            self._told_at = time.monotonic()
            if num_nodes() > 1:
                store = distributed().distributed_c10d._get_default_store()
                self._others, self._untold = store.add(self._key, self._untold), 0
        return self._others + self._untold


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
