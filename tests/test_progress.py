"""The progress line, in a log file and on a terminal."""

import os
import pty
import subprocess
import sys

import pytest

from megavar import progress
from megavar.progress import ProgressLine, in_megabytes


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    with ProgressLine("policy") as line:
        for step in range(1, 101):
            clock[0] += 1
            line.update(step, 100, "steps, loss 0.5")
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "policy: 30 of 100 steps, loss 0.5, 0:00:30, 0:01:10 left",
        "policy: 60 of 100 steps, loss 0.5, 0:01:00, 0:00:40 left",
        "policy: 90 of 100 steps, loss 0.5, 0:01:30, 0:00:10 left",
        "policy: 100 of 100 steps, loss 0.5, 0:01:40, 0:00:00 left",
    ]


def test_time_left_does_not_count_what_was_done_before(clock, capsys):
    with ProgressLine("policy", done_before=1000) as line:
        clock[0] += 40
        line.update(1010, 1020, "steps")
    assert "0:00:40, 0:00:40 left" in capsys.readouterr().err


def test_bytes_add_up_to_megabytes_and_a_rate(clock, capsys):
    with ProgressLine("to-hf") as line:
        advance = in_megabytes(line)
        clock[0] += 2
        advance(1_000_000_000, 1_500_000_000)
        clock[0] += 1
        advance(500_000_000, 1_500_000_000)
    assert capsys.readouterr().err == "to-hf: 1,500.0 of 1,500.0 MB, 500 MB/s, 0:00:03, 0:00:00 left\n"


def test_other_ranks_and_work_without_a_total_are_quiet(clock, capsys):
    with ProgressLine("policy", show=False) as line:
        clock[0] += 100
        line.update(5, 5, "steps")
    with ProgressLine("posterior traces") as line:
        line.update(5, None, "requests")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    code = "from megavar.progress import ProgressLine\nwith ProgressLine('policy') as line: line.update(7, 9, 'steps')"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "━" in shown and "7 of 9 steps" in shown
