"""How far long work is, on one line: a bar on a terminal, else a plain line now and then, for a log file."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 30.0


class ProgressLine:
    """Description, how much of how much, the note, time taken and time left; on stderr.

    What an earlier attempt had done before is not counted into the speed.
    """

    def __init__(self, description: str, done_before: float = 0, show: bool = True) -> None:
        """`show` is off on all ranks but one."""
        console = Console(file=sys.stderr)
        self._description = description
        self._bar = Progress(
            TextColumn(description),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            refresh_per_second=2,
            disable=not (show and console.is_terminal),
        )
        self._prints = show and not console.is_terminal
        self._task: TaskID | None = None
        self._start = self._printed = time.monotonic()
        self._done_before = done_before

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._start

    def update(self, done: float, total: float | None, note: str) -> None:
        """Show what is done; without a total there is no time left to tell. The note begins with what is counted."""
        now = time.monotonic()
        text = f"{_number(done)}{'' if total is None else f' of {_number(total)}'} {note}, {_clock(self.seconds)}"
        if total is not None and done > self._done_before:
            left = self.seconds * (total - done) / (done - self._done_before)
            text += f", {_clock(left)} left"
        if self._task is None:
            self._task = self._bar.add_task("", total=total, text=text)
        self._bar.update(self._task, completed=done, total=total, text=text)
        if self._prints and (now - self._printed >= SECONDS_BETWEEN_LINES or done == total):
            self._printed = now
            print(f"{self._description}: {text}", file=sys.stderr, flush=True)


def in_megabytes(line: ProgressLine) -> Callable[[int, int], None]:
    """A function to call with (bytes done since the last call, bytes in all)."""
    done = 0

    def advance(num_bytes: int, total_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        rate = done / 1e6 / max(line.seconds, 1e-9)
        line.update(done / 1e6, total_bytes / 1e6, f"MB, {rate:,.0f} MB/s")

    return advance


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
