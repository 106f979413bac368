"""One writer a run: what a lock on a folder must survive, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megavar.runs import owner
from megavar.runs.owner import owned, refuse_owned

FILE = "owner.json"
HOLD = """
import sys, time
from pathlib import Path
from megavar.runs import owner
owner.BEAT_SECONDS = 0.2
with owner.owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(float(sys.argv[2]))
"""
RACE = """
import os, sys, time
from pathlib import Path
from megavar.runs import owner
owner.POLL_SECONDS = 0.01
folder = Path(sys.argv[1])
with owner.owned(folder):
    alone = os.open(folder / "alone", os.O_CREAT | os.O_EXCL)  # fails if another process is inside
    time.sleep(0.05)
    os.close(alone)
    os.unlink(folder / "alone")
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owned\n"
    return process


def write_owner(folder: Path, **changes: object) -> dict:
    """An owner.json as a process of another machine would leave it."""
    folder.mkdir(exist_ok=True)
    row = {"host": "elsewhere", "pid": 1, "process": "boot 1", "job": "77", "since": "2026-01-02T03:04:05+00:00",
           "token": "theirs", "beat": 3, **changes}  # fmt: skip
    (folder / FILE).write_text(json.dumps(row))
    return row


def test_the_file_names_the_owner_and_is_gone_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with owned(tmp_path / "run"):
        row = json.loads((tmp_path / "run" / FILE).read_text())
        assert (row["host"], row["pid"], row["job"]) == (socket.gethostname(), os.getpid(), "42")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_live_owner_is_waited_for_and_then_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(owner, "ENDING_SECONDS", 2.0)
    process = hold(tmp_path, 60)
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .*, which lives"), owned(tmp_path):
        pass
    assert "waiting for its owner" in capsys.readouterr().out
    process.kill()


def test_an_owner_that_ends_meanwhile_is_followed(tmp_path):
    process = hold(tmp_path, 1.5)
    with owned(tmp_path):
        assert process.wait(10) == 0
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_killed_owner_is_followed_at_once(tmp_path):
    process = hold(tmp_path, 60)
    process.kill()
    process.wait()
    started = time.monotonic()
    with owned(tmp_path):
        assert time.monotonic() - started < 0.5


def test_a_process_that_has_the_id_of_the_dead_owner_is_not_taken_for_it(tmp_path):
    write_owner(tmp_path, host=socket.gethostname(), pid=os.getppid(), process="another boot 17")
    with owned(tmp_path):
        pass


def test_an_owner_elsewhere_is_refused_when_its_counter_moves_and_followed_when_it_stands_still(tmp_path, monkeypatch):
    row = write_owner(tmp_path)
    writer = threading.Timer(1.0, write_owner, [tmp_path], {"beat": 4})
    writer.start()
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere, job 77, since 2026"), owned(tmp_path):
        pass
    monkeypatch.setattr(owner, "STALE_SECONDS", 2.0)
    started = time.monotonic()
    with owned(tmp_path):
        assert 2 <= time.monotonic() - started < 4
        assert json.loads((tmp_path / FILE).read_text())["token"] != row["token"]


def test_a_look_before_a_start_refuses_a_live_owner_only(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.5)
    with owned(tmp_path), pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on "):
        refuse_owned(tmp_path)
    refuse_owned(tmp_path)
    write_owner(tmp_path, host=socket.gethostname(), pid=os.getppid(), process="another boot 17")
    refuse_owned(tmp_path)
    write_owner(tmp_path)
    refuse_owned(tmp_path)  # its counter stands still
    threading.Timer(0.5, write_owner, [tmp_path], {"beat": 4}).start()
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere, job 77"):
        refuse_owned(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_a_file_whose_writer_was_killed_while_it_wrote_is_followed(tmp_path, monkeypatch, content):
    monkeypatch.setattr(owner, "STALE_SECONDS", 1.0)
    (tmp_path / FILE).write_text(content)
    with owned(tmp_path):
        pass


def test_of_many_that_find_a_dead_owner_one_at_a_time_is_inside(tmp_path):
    """Twelve processes, each of which fails if it meets another one in the folder."""
    write_owner(tmp_path, host=socket.gethostname(), pid=2**22 + 1)
    racers = [subprocess.Popen([sys.executable, "-c", RACE, tmp_path], stderr=subprocess.PIPE) for _ in range(12)]
    for racer in racers:
        _, errors = racer.communicate(timeout=60)
        assert racer.returncode == 0, errors.decode()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_was_taken_over_while_it_was_suspended_ends_and_leaves_the_other_its_file(tmp_path):
    process = hold(tmp_path, 60)
    process.send_signal(signal.SIGSTOP)
    os.replace(tmp_path / FILE, tmp_path / "aside")
    write_owner(tmp_path)
    process.send_signal(signal.SIGCONT)
    assert process.wait(5) == 1
    assert "was taken over by process 1 on elsewhere" in process.stdout.read()
    assert json.loads((tmp_path / FILE).read_text())["token"] == "theirs"


def test_who_comes_late_to_a_dead_owners_file_leaves_the_next_owner_its_file(tmp_path):
    """Two find the owner dead; the slower one moves away what the quicker one has made by then."""
    write_owner(tmp_path)
    stale = owner._read(tmp_path / FILE)
    write_owner(tmp_path, token="the quicker one's")
    owner._remove(tmp_path / FILE, stale)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert json.loads((tmp_path / FILE).read_text())["token"] == "the quicker one's"
