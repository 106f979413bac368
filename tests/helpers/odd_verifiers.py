"""Verifiers that misbehave, importable by worker processes."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path


def sleep_then_match(response: str, gold: str) -> str:
    """Sleeps as many seconds as the response starts with."""
    time.sleep(float(response.split()[0]))
    return "correct" if response.split()[1] == gold else "wrong"


def hang_deaf_to_signals(response: str, gold: str) -> str:
    """Hangs, and only SIGKILL ends it."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)
    return "correct"


def die(response: str, gold: str) -> str:
    os._exit(7)


def fail(response: str, gold: str) -> str:
    raise RuntimeError("odd")


def return_something_else(response: str, gold: str) -> str:
    return "ready"


def count_calls(response: str, gold: str) -> str:
    """Leaves one more file in the folder that `gold` names."""
    (Path(gold) / f"{time.monotonic_ns()}").touch()
    return "correct"


def record_and_kill_caller_once(response: str, gold: str) -> str:
    """Leaves a file named by the response and the process; on response `kill`, ends the caller, but once only."""
    folder = Path(gold)
    (folder / f"{response}-{os.getpid()}").touch()
    if response == "kill" and not (folder / "killed").exists():
        (folder / "killed").touch()
        caller = multiprocessing.parent_process()
        assert caller is not None and caller.pid is not None
        os.kill(caller.pid, signal.SIGKILL)
        time.sleep(60)
    return "correct" if response == "kill" else "wrong"


def name_process_and_hang(response: str, gold: str) -> str:
    """Writes its process id to the file that `gold` names."""
    aside = Path(gold + ".tmp")
    aside.write_text(str(os.getpid()))
    aside.rename(gold)
    time.sleep(60)
    return "correct"


def has_no_torch(response: str, gold: str) -> str:
    return "wrong" if "torch" in sys.modules else "correct"


class NotImportable:
    """A verifier that a worker cannot unpickle, like one whose module it lacks."""

    def __reduce__(self):
        return fail, ("", "")

    def __call__(self, response: str, gold: str) -> str:
        return "correct"
