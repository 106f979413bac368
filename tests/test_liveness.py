"""Ranks that end with each other, and a wish to stop that reaches all, between real processes over a real store."""

import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import TCPStore

RANK = """
import sys, time
from torch.distributed import TCPStore
from megavar import liveness, ranks
from megavar.stopping import request_stop, stop_requested
rank, num_ranks, port, host = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
liveness.BEAT_SECONDS, liveness.SILENT_SECONDS, liveness.GRACE_SECONDS = 0.2, 3.0, 1.0
if host:
    liveness.socket.gethostname = lambda: host
store = TCPStore("localhost", port, is_master=False)
watch = liveness.RankWatch(store, rank, num_ranks)
print("watching", flush=True)
for line in sys.stdin:
    if line == "leave\\n":
        watch.leave()
    elif line == "ask\\n":
        request_stop(10)
    elif line == "asked?\\n":
        print(stop_requested(), flush=True)
    elif line == "fail\\n":
        store.set(ranks.RUN_ENDED, "7")
"""


class Rank:
    def __init__(self, rank: int, num_ranks: int, port: int, host: str = "") -> None:
        command = [sys.executable, "-c", RANK, str(rank), str(num_ranks), str(port), host]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "watching\n"

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@pytest.fixture
def store():
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def started(store):
    ranks = [Rank(rank, 3, store.port) for rank in range(3)]
    yield ranks
    for rank in ranks:
        rank.process.kill()


def ended(ranks: list[Rank], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    return [rank.process.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]


def test_all_ranks_end_within_seconds_of_one(started):
    started[1].process.kill()
    started[1].process.wait()
    assert ended([started[0], started[2]], 5) == [1, 1]
    printed = started[0].process.stdout.read() + started[2].process.stdout.read()
    assert (
        printed == f"error: rank 0 ends: rank 1 (process {started[1].process.pid}) is gone; the same command resumes\n"
    )


def test_a_suspended_rank_of_another_machine_is_silent_and_ends_the_others(store):
    ranks = [Rank(rank, 3, store.port, host=f"node-{rank}") for rank in range(3)]
    time.sleep(1)
    ranks[2].process.send_signal(signal.SIGSTOP)
    assert ended(ranks[:2], 8) == [1, 1]
    printed = ranks[1].process.stdout.read()
    assert printed.startswith(f"error: rank 1 ends: rank 2 (node-2 {ranks[2].process.pid} ")
    assert "has been silent for 3 s" in printed
    ranks[2].process.send_signal(signal.SIGCONT)
    assert ended(ranks[2:], 5) == [1]


def test_a_rank_that_fails_ends_the_others_with_its_code(started):
    started[2].tell("fail")
    assert ended(started, 5) == [7, 7, 7]


def test_a_rank_that_leaves_in_order_ends_nobody(started):
    started[1].tell("leave")
    started[1].process.stdin.close()
    assert started[1].process.wait(5) == 0
    time.sleep(1.5)
    assert [rank.process.poll() for rank in started] == [None, 0, None]


def test_a_wish_to_stop_reaches_every_rank(started):
    started[2].tell("ask")
    time.sleep(1.5)
    for rank in started:
        rank.tell("asked?")
        assert rank.process.stdout.readline().strip() in ("10", "Signals.SIGUSR1")


def test_ranks_end_when_the_store_is_gone():
    code = "import time; from torch.distributed import TCPStore; s = TCPStore('localhost', 0, is_master=True, "
    code += "wait_for_workers=False); print(s.port, flush=True); time.sleep(60)"
    agent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    port = int(agent.stdout.readline())
    ranks = [Rank(rank, 2, port) for rank in range(2)]
    agent.kill()
    assert ended(ranks, 5) == [1, 1]
    assert "the rendezvous store of this run is gone" in ranks[0].process.stdout.read()
