"""Nothing of a server outlives it, its watchdog or its parent, whichever is killed."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from helpers.processes import runs

from megavar.rollout import watchdog

SERVER = """
import os, signal, socket, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1:]:
    child = subprocess.Popen([sys.executable, __file__])  # it knows of no parent's death
    Path(os.environ["TMPDIR"], "file").touch()
    Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), *sys.argv[2:]]
watchdog = subprocess.Popen(command, start_new_session=True)
print(watchdog.pid, flush=True)
watchdog.wait()
time.sleep(600)
"""


@dataclass
class Tree:
    """A parent, its watchdog, a server that ignores SIGTERM, and the server's child."""

    parent: psutil.Process
    watchdog: psutil.Process
    server: psutil.Process
    child: psutil.Process
    folder: Path
    """For temporary files; the watchdog's is in it."""

    def left(self) -> list[object]:
        """Processes below the parent and temporary files that are still there."""
        processes = [each for each in (self.watchdog, self.server, self.child) if runs(each)]
        return [*processes, *self.folder.iterdir()]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    folder, pids = tmp_path / "tmp", tmp_path / "pids"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "server.py").write_text(SERVER)
    command = [watchdog.__file__, sys.executable, str(tmp_path / "server.py"), str(pids)]
    with subprocess.Popen([sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        guard = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: pids.exists() and pids.read_text().count(" ") == 1)
        server, child = map(psutil.Process, map(int, pids.read_text().split()))
        try:
            yield Tree(psutil.Process(parent.pid), guard, server, child, folder)
        finally:
            parent.kill()
            for process in (guard, server, child):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("cause", ["parent killed", "server killed", "watchdog terminated"])
def test_nothing_is_left_after_any_death(tree: Tree, cause: str, stopped: bool) -> None:
    assert len(tree.left()) == 4
    if stopped:
        tree.server.suspend()
        tree.child.suspend()
    who, how = cause.split()
    {"killed": psutil.Process.kill, "terminated": psutil.Process.terminate}[how](getattr(tree, who))
    wait_until(lambda: not tree.left(), seconds=5)


def test_a_killed_watchdog_takes_the_server_along_and_the_next_one_removes_its_folder(tree: Tree) -> None:
    watchdog.remove_stale_folders()
    assert [path.name for folder in tree.folder.iterdir() for path in folder.iterdir()] == ["file"]  # in use
    tree.watchdog.kill()
    wait_until(lambda: not runs(tree.server))
    tree.child.kill()
    assert len(list(tree.folder.iterdir())) == 1
    ended = [sys.executable, watchdog.__file__, str(os.getpid()), sys.executable, "-c", "raise SystemExit(3)"]
    assert subprocess.run(ended, start_new_session=True).returncode == 3
    assert not list(tree.folder.iterdir())


def test_a_watchdog_whose_parent_is_gone_before_it_starts_ends_at_once() -> None:
    ended = [sys.executable, watchdog.__file__, "1", sys.executable, "-c", "import time; time.sleep(600)"]
    assert subprocess.run(ended, timeout=10, start_new_session=True).returncode == 1
