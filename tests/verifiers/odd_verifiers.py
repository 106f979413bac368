"""Verifiers that misbehave, importable by worker processes."""

import os
import time


def sleep_then_match(response: str, gold: str) -> str:
    """Sleeps as many seconds as the response starts with."""
    time.sleep(float(response.split()[0]))
    return "correct" if response.split()[1] == gold else "wrong"


def die(response: str, gold: str) -> str:
    os._exit(7)


def fail(response: str, gold: str) -> str:
    raise RuntimeError("odd")
