"""Looking at processes that may end at any moment."""

import psutil


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that has and was not waited for does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two looks
        return False
