"""What tests have other processes do. These import nothing else, so that they start quickly."""

import contextlib
from multiprocessing.connection import Connection
from pathlib import Path

from megavar.checkpoints.convert import to_megatron
from megavar.cli import main


def megavar(log: Path, succeeds: bool, *arguments: str) -> None:
    """Run a command and add what it prints to a file."""
    with log.open("a") as printed, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert (main(arguments) == 0) == succeeds


def convert_until_killed(folder: Path, target: Path, ready: Connection) -> None:
    """Convert again and again, each time over the result of the time before."""
    ready.send("ready")
    while True:
        to_megatron(folder, target, None, True)
