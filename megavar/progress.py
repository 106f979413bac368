"""Progress of a long-running job: a bar on a terminal, a line every 30 seconds otherwise (log files)."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 30.0


class ProgressLine:
    """Prints description, done / total, a note, elapsed and remaining time to stderr.

    Args:
        description: name of the job.
        done_before: work already done when the job was resumed; not used to estimate the speed.
        show: print anything; pass False on all ranks but one.
    """

    def __init__(self, description: str, done_before: float = 0, show: bool = True) -> None:
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
        """Seconds since the job started."""
        return time.monotonic() - self._start

    def update(self, done: float, total: float | None, note: str) -> None:
        """Show progress.

        Args:
            done: units of work done, `done_before` included.
            total: None if unknown; then no remaining time is shown.
            note: starts with the unit, such as `steps` or `MB`.
        """
        now = time.monotonic()
        prints = self._prints and (now - self._printed >= SECONDS_BETWEEN_LINES or done == total)
        if self._bar.disable and not prints:
            return
        text = f"{_number(done)}{'' if total is None else f' of {_number(total)}'} {note}, {_clock(self.seconds)}"
        if total is not None and done > self._done_before:
            remaining = self.seconds * (total - done) / (done - self._done_before)
            text += f", {_clock(remaining)} left"
        if self._task is None:
            self._task = self._bar.add_task("", total=total, text=text)
        self._bar.update(self._task, completed=done, total=total, text=text)
        if prints:
            self._printed = now
            print(f"{self._description}: {text}", file=sys.stderr, flush=True)


def in_megabytes(line: ProgressLine) -> Callable[[int, int], None]:
    """Make a callback (bytes done since the last call, total bytes) that shows progress in MB and MB/s."""
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
