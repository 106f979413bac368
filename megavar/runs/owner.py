"""One owner a run's folder: `owner.json` names the process that writes it, and that process shows that it lives.

Two jobs on one folder would both write parts and entries of the manifest. The file is made by an exclusive create,
which network file systems have too, and carries a counter that the owner advances. An owner of this machine is asked
for by process id; one of another machine is taken for dead when its counter has stood still, by the clock of whoever
waits (clocks of machines differ). An owner that finds another one's file in place of its own ends at once.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from megavar.disk import make_folder
from megavar.ranks import process_exists
from megavar.stopping import stop_if_requested

FILE = "owner.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""An owner of another machine whose counter stood still for this long is taken for dead."""
LOST_SECONDS = 40.0
"""An owner that could not show for this long that it lives ends, before another one takes over."""
ENDING_SECONDS = 20.0
"""How long a live owner of this machine is waited for: one that was told to stop is about to end."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Owner:
    """Contents of owner.json."""

    host: str
    pid: int
    process: str
    """Tells processes with the same id apart: boot of the machine and start of the process."""
    job: str | None
    """Id of the scheduler's job."""
    since: str
    """Local time with its offset."""
    token: str
    beat: int = 0

    def __str__(self) -> str:
        job = "" if self.job is None else f", job {self.job}"
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @property
    def is_dead(self) -> bool:
        """Known to have ended: only of an owner of this machine."""
        if self.host != socket.gethostname():
            return False
        return not process_exists(self.pid) or _process(self.pid) != self.process


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the folder of a run, which is created, until the end; for the process that writes it.

    Raises:
        ValueError: if a live process owns it, naming that.
        Stopped: if this process was asked to stop while it waited.
    """
    make_folder(folder)
    file = folder / FILE
    me = Owner(
        socket.gethostname(),
        os.getpid(),
        _process(os.getpid()),
        os.environ.get("SLURM_JOB_ID"),
        datetime.now().astimezone().isoformat(timespec="seconds"),
        uuid.uuid4().hex,
    )
    _acquire(file, me)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, me, over), name="run owner", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        current = _read(file)
        if current is not None and current.token == me.token:
            file.unlink(missing_ok=True)


def refuse_owned(folder: Path) -> None:
    """Look whether a live process owns the folder of a run; one of another machine is watched for some seconds.

    Raises:
        ValueError: if so, naming that.
    """
    file = folder / FILE
    owner = _read(file)
    if owner is None or owner.is_dead:
        return
    if owner.host != socket.gethostname():
        time.sleep(2 * BEAT_SECONDS)
        later = _read(file)
        if later is None or later == owner:
            return  # it has ended, or the next owner finds out
        owner = later
    raise _refusal(file, owner)


def _acquire(file: Path, me: Owner) -> None:
    seen: Owner | None = None
    seen_at = started = time.monotonic()
    said = False
    while not _create(file, me):
        stop_if_requested(f"nothing was changed in {file.parent}")
        current, now = _read(file), time.monotonic()
        if current != seen:
            advanced = seen is not None and current is not None and current.token == seen.token
            if current is not None and advanced and current.host != me.host:
                raise _refusal(file, current)
            seen, seen_at = current, now
        here = current is not None and current.host == me.host
        # A file that cannot be read is being written, or its writer was killed at that.
        silent_seconds = now - seen_at if file.exists() else 0.0
        if (current is not None and current.is_dead) or (not here and silent_seconds > STALE_SECONDS):
            print(
                f"{file.parent}: taken over from {current or 'an owner that left no name'}, which is gone", flush=True
            )
            _remove(file, current)
            continue
        if current is not None and here and now - started > ENDING_SECONDS:
            raise _refusal(file, current)
        if not said and now - started > 2 * POLL_SECONDS:
            said = True
            print(f"{file.parent}: waiting for its owner, {current}, to end or show that it lives", flush=True)
        time.sleep(POLL_SECONDS)


def _refusal(file: Path, owner: Owner) -> ValueError:
    return ValueError(
        f"{file.parent} is in use by {owner}, which lives; wait for it or stop it, or choose another run name "
        "(docs/troubleshooting.md#run-in-use)."
    )


def _create(file: Path, me: Owner) -> bool:
    """Whether the file was not there and is ours now."""
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "w") as text:
            text.write(_text(me))
            text.flush()
            os.fsync(handle)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner), indent=2) + "\n"


def _read(file: Path) -> Owner | None:
    """None if there is no file, or none that can be read."""
    try:
        return Owner(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remove(file: Path, stale: Owner | None) -> None:
    """Remove the file of a dead owner; if another process was quicker and owns the folder now, leave it that."""
    aside = file.with_name(f".{FILE}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.rename(file, aside)
        if _read(aside) != stale:
            with suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def _beat(file: Path, me: Owner, over: threading.Event) -> None:
    """Advance the counter in place, never by a rename: that would replace the file of a process that took over."""
    shown_at, beat, problem = time.monotonic(), 0, ""
    while not over.wait(BEAT_SECONDS):
        beat += 1
        try:
            with file.open("r+") as text:
                current = Owner(**json.loads(text.read()))
                if current.token != me.token:
                    _end(file, f"was taken over by {current}")
                text.seek(0)
                text.write(_text(replace(me, beat=beat)))
            shown_at = time.monotonic()
        except (OSError, ValueError, TypeError) as error:
            problem = str(error)
        if time.monotonic() - shown_at > LOST_SECONDS:
            _end(file, f"could not be kept: {problem}")


def _end(file: Path, reason: str) -> None:
    """The main thread may be writing what is another process's by now, so this one ends without cleaning up."""
    print(f"error: {file.parent} {reason}; this process ends", flush=True)
    os._exit(1)


def _process(pid: int) -> str:
    """Boot of the machine and start time of a process, in clock ticks since then; empty where there is no /proc."""
    with suppress(OSError):
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {start}"
    return ""
