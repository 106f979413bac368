"""Files that are complete or absent: written aside, synced and renamed, as are the folders they are in."""

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megavar.ranks import ExplainedFailure, process_exists

_HOST = socket.gethostname()


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Context manager: yields a temporary path in the folder of `file`; on success it is synced and renamed to `file`.

    The folder is synced too: a power cut could undo the rename. Stale temporary files of dead processes of this machine
    are removed.

    Raises:
        ExplainedFailure: if the file cannot be written (a full disk, a quota); an old one is then as it was.
    """
    for existing in file.parent.glob(f".{glob.escape(file.name)}.{glob.escape(_HOST)}.*.tmp"):
        pid = existing.name.split(".")[-2]
        if pid.isdecimal() and not process_exists(int(pid)):
            existing.unlink(missing_ok=True)
    temporary = file.with_name(f".{file.name}.{_HOST}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        free_megabytes = shutil.disk_usage(file.parent).free / 1e6
        raise ExplainedFailure(
            f"{file} could not be written: {error.strerror or error} ({free_megabytes:,.0f} MB are free); what was "
            "written before is kept, and once that is mended the same command goes on."
        ) from error


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where they are missing, and sync the folders that they are created in."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
