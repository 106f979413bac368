"""Run a server so that it cannot outlive the process that started it: `python watchdog.py PARENT_PID COMMAND …`.

A trainer that is killed with SIGKILL cannot clean up, and a forgotten server keeps its devices. So each server is the
child of this watchdog, which polls its own parent and kills the process group when the parent is gone. (Setting
PR_SET_PDEATHSIG from the trainer itself would tie the server to the *thread* that started it, see prctl(2), and running
Python between fork and exec of a process with threads can deadlock; the watchdog has one thread.) Standard library
only: it is run by file path.
"""

import ctypes
import os
import signal
import subprocess
import sys

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Ask Linux to kill the calling process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(parent_pid: int, command: list[str]) -> int:
    """Run `command` until it ends, returning its exit status, or kill the process group once orphaned."""
    server = subprocess.Popen(command, preexec_fn=die_with_parent if sys.platform == "linux" else None)
    # For the server's main process only, which then ends its own children in order.
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while os.getppid() == parent_pid:
        try:
            return server.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    os.killpg(0, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
