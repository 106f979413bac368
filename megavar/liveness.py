"""Whether the other ranks of a run are alive: each rank gives signs of life and watches those of the next one.

Ranks that wait for a dead one in a collective would wait for half an hour; here all end within a minute, mostly within
seconds. Nothing is lost by that: what is on disk is complete, and the rerun does the rest. A wish to stop
(`stopping.py`) and the end of the run reach the other ranks the same way, through the rendezvous store.
"""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from megavar.ranks import RUN_ENDED, distributed, process_exists
from megavar.stopping import request_stop, stop_requested

BEAT_SECONDS = 1.0
SILENT_SECONDS = 45.0
"""A rank of another machine that gave no sign of life for this long is taken for dead."""
GRACE_SECONDS = 10.0
"""For this rank to end by itself once another one has ended the run."""
STORE_SECONDS = 30.0
"""Limit of one exchange with the store."""
_BEAT, _STOP = "megavar/alive", "megavar/stop"
_LEFT = "left"


class RankWatch:
    """Signs of life of one rank, in a thread; it ends the process when the next rank, or the store, is gone.

    Args:
        store: of the process group; ranks of one node find dead ones by process id, others by their silence.
        rank: of this process.
        num_ranks: of the run, at least 2.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int) -> None:
        self._store = store.clone()  # calls on one store object wait for each other
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._rank, self._next = rank, (rank + 1) % num_ranks
        self._over = threading.Event()
        self.heard_the_end = threading.Event()
        """Another rank has ended the run."""
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Say that this rank ends in order."""
        self._over.set()
        self._thread.join()
        self._say(f"{_BEAT}/{self._rank}", _LEFT)

    def _watch(self) -> None:
        seen, seen_at, count = "", time.monotonic(), 0
        me = f"{socket.gethostname()} {os.getpid()}"
        while not self._over.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"{_BEAT}/{self._rank}", f"{me} {count}")
                if code := self._heard(RUN_ENDED):
                    self.heard_the_end.set()
                    if not self._over.wait(GRACE_SECONDS):
                        os._exit(int(code))
                    return
                self._pass_on_the_wish_to_stop()
                beat = self._heard(f"{_BEAT}/{self._next}")
            except RuntimeError:
                self._end("the rendezvous store of this run is gone, and with it the first node's agent")
            if beat != seen:
                seen, seen_at = beat, time.monotonic()
            if beat and beat != _LEFT:
                host, pid, _ = beat.rsplit(" ", 2)
                if host == socket.gethostname() and not process_exists(int(pid)):
                    self._end(f"rank {self._next} (process {pid}) is gone")
            if beat != _LEFT and time.monotonic() - seen_at > SILENT_SECONDS:
                self._end(f"rank {self._next} ({beat or 'never seen'}) has been silent for {SILENT_SECONDS:.0f} s")

    def _pass_on_the_wish_to_stop(self) -> None:
        if number := self._heard(_STOP):
            request_stop(signal.Signals(int(number)))
        elif (wish := stop_requested()) is not None:
            self._store.set(_STOP, str(int(wish)))

    def _heard(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _say(self, key: str, text: str) -> None:
        with suppress(RuntimeError):  # the store is gone, and whoever would read it too
            self._store.set(key, text)

    def _end(self, reason: str) -> NoReturn:
        # A main thread that waits in a collective sees no exception, and one that writes does so aside.
        print(f"error: rank {self._rank} ends: {reason}; the same command resumes", flush=True)
        self._say(RUN_ENDED, "1")
        os._exit(1)


_watch: RankWatch | None = None


def watch_other_ranks() -> None:
    """Start to give and watch signs of life, once this process has joined a process group of several ranks."""
    global _watch
    dist = distributed()
    if dist is not None and dist.get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        _watch = RankWatch(store, dist.get_rank(), dist.get_world_size())


def leave_other_ranks() -> None:
    """Say that this rank ends in order; nothing if it does not watch."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def another_rank_ended(wait_seconds: float) -> bool:
    """Whether another rank has ended the run, or is found dead within this time."""
    return _watch is not None and _watch.heard_the_end.wait(wait_seconds)
