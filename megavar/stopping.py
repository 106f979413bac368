"""Stopping in order: a signal only asks for it, and the work stops at its next step, chunk or request.

Schedulers send SIGTERM or SIGUSR1, a closed terminal SIGHUP, Ctrl-C SIGINT. `liveness.py` passes the wish on to the
other ranks; those agree on the step at which they stop (`training/parallel.py`).
"""

import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
RUN_AGAIN = 75
"""Exit code of a run that stopped in order: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""The same after Ctrl-C, as shells have it."""
_INSISTING_SECONDS = 3.0
"""Ctrl-C reaches a rank twice, from the terminal and from torchrun's agent; one that comes later is a second wish."""

_handlers_before: dict[signal.Signals, Any] = {}
_requested: signal.Signals | None = None
_requested_at = 0.0


class Stopped(Exception):
    """The work stopped because it was asked to.

    Args:
        saved: what is on disk, as part of a sentence.
    """

    def __init__(self, saved: str) -> None:
        by = "" if _requested is None else f" by {_requested.name}"
        super().__init__(f"stopped{by}: {saved}; the same command goes on")
        self.exit_code = INTERRUPTED if _requested == signal.SIGINT else RUN_AGAIN


def catch_signals() -> None:
    """From now on signals ask for a stop instead of ending the process; called in the main thread of a rank."""
    if not _handlers_before:
        _handlers_before.update({number: signal.signal(number, _on_signal) for number in SIGNALS})


def release_signals() -> None:
    """Undo `catch_signals`, and forget a wish to stop."""
    global _requested
    while _handlers_before:
        signal.signal(*_handlers_before.popitem())
    _requested = None


def request_stop(number: signal.Signals) -> None:
    """Ask this process to stop, as the signal does; the first one counts."""
    global _requested, _requested_at
    if _requested is None:
        _requested, _requested_at = number, time.monotonic()


def stop_requested() -> signal.Signals | None:
    """The signal that asked this process to stop, if any."""
    return _requested


def stop_if_requested(saved: str) -> None:
    """For work that can be left at this point.

    Args:
        saved: what is on disk, as part of a sentence.

    Raises:
        Stopped: if this process was asked to stop.
    """
    if _requested is not None:
        raise Stopped(saved)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    insisting = _requested is not None and time.monotonic() - _requested_at > _INSISTING_SECONDS
    request_stop(signal.Signals(number))
    if insisting and number == signal.SIGINT:
        raise KeyboardInterrupt
