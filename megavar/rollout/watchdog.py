"""Run a server so that nothing of it outlives the process that started it: `python watchdog.py PARENT_PID COMMAND …`.

A trainer that is killed with SIGKILL cannot clean up, and a forgotten server keeps its devices. So each server is the
child of this watchdog, which polls its own parent. Once that is gone, the server has ended, or SIGTERM asks for it, the
watchdog kills what is left of the process group (with SIGKILL: a server holds nothing that could be lost) and removes
the folder for temporary files that it gave the server. If the watchdog is killed, the server dies with it, and the
next `remove_stale_folders` removes the folder, which it finds unlocked.

(Setting PR_SET_PDEATHSIG from the trainer itself would tie the server to the *thread* that started it, see prctl(2),
and running Python between fork and exec of a process with threads can deadlock; the watchdog has one thread.) Standard
library only: it is run by file path.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from glob import glob
from types import FrameType
from typing import NoReturn

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
SUFFIX = ".megavar-server"


def die_with_parent() -> None:
    """Ask Linux to kill the calling process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def locked_folder() -> str:
    """A new folder for temporary files, which is locked as long as this process lives."""
    new = tempfile.mkdtemp()
    fcntl.flock(os.open(new, os.O_RDONLY), fcntl.LOCK_EX)  # never closed
    os.rename(new, new + SUFFIX)  # only now may others look whether it is locked
    return new + SUFFIX


def remove_stale_folders() -> None:
    """Remove folders of this user whose watchdogs were killed."""
    for folder in glob(os.path.join(tempfile.gettempdir(), "*" + SUFFIX)):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(descriptor)


def kill_group() -> None:
    """Kill all other processes of this process group, and wait until they are gone."""
    while others := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if in_group(pid)]:
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # orphans are our children: we are their subreaper
                pass
        time.sleep(0.02)


def in_group(pid: int) -> bool:
    """Whether it is another process of this one's group."""
    try:
        return pid != os.getpid() and os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        return False


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Handler of SIGTERM."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main(parent_pid: int, command: list[str]) -> int:
    """Run `command` until it ends, SIGTERM comes or the parent is gone; returns its exit status."""
    assert os.getpgrp() == os.getpid(), "the group that will be killed is another process's; use start_new_session"
    remove_stale_folders()
    folder = locked_folder()
    signal.signal(signal.SIGTERM, stop)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        server = subprocess.Popen(command, env={**os.environ, "TMPDIR": folder}, preexec_fn=die_with_parent)
        while os.getppid() == parent_pid:
            try:
                return server.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        return 1
    finally:
        kill_group()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
