"""Deadlines, crashes and order of the verifier pool, with real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import odd_verifiers

from megavar.stopping import Stopped, release_signals, request_stop
from megavar.verifiers import get_verifier
from megavar.verifiers.pool import VerifyJob, verify_all


def run(jobs, num_workers=2, timeout_seconds=30.0):
    seen = {}
    assert verify_all(jobs, num_workers, timeout_seconds, seen.__setitem__) == len(jobs)
    return [seen[index] for index in range(len(jobs))]


def timed(response, gold="x"):
    return VerifyJob(odd_verifiers.sleep_then_match, response, gold)


def test_verdicts_stay_with_their_jobs_whatever_finishes_first():
    jobs = [timed("0.6 x"), timed("0 y"), timed("0.3 y"), timed("0 x"), timed("0.01 x")]
    seen = {}
    verify_all(jobs, 2, 30.0, seen.__setitem__)
    assert [seen[index] for index in range(5)] == ["correct", "wrong", "wrong", "correct", "correct"]
    order = list(seen)
    assert sorted(order) == [0, 1, 2, 3, 4] and order != sorted(order)  # as they arrive, not as they were asked


def test_a_hanging_job_costs_its_deadline_and_no_more():
    hanging = VerifyJob(odd_verifiers.hang_deaf_to_signals, "", "")
    jobs = [hanging, *(timed(f"0.0{index} x") for index in range(1, 6))]
    started = time.monotonic()
    assert run(jobs, num_workers=1, timeout_seconds=1.0) == ["timeout"] + ["correct"] * 5
    assert time.monotonic() - started < 20  # two starts of a worker, not sixty seconds


def test_a_workers_start_does_not_count_against_the_first_job():
    # Starting takes several times this deadline.
    job = VerifyJob(get_verifier("math"), "\\boxed{7}", "7")
    assert run([job], num_workers=1, timeout_seconds=0.25) == ["correct"]


@pytest.mark.parametrize(
    ("verifier", "verdict"),
    [
        (odd_verifiers.die, "error: worker died with code 7"),
        (odd_verifiers.fail, "error: RuntimeError: odd"),
        (
            odd_verifiers.return_something_else,
            "error: the verifier returned 'ready', expected one of correct, wrong, no_answer",
        ),
    ],
)
def test_a_crash_or_an_exception_touches_its_own_row_only(verifier, verdict):
    jobs = [timed("0 x"), VerifyJob(verifier, "0 x", "x"), timed("0.1 x"), timed("0.2 y")]
    assert run(jobs) == ["correct", verdict, "correct", "wrong"]


def test_a_verifier_that_workers_cannot_import_touches_its_own_rows_only():
    """Also where it is given to a worker together with others."""
    jobs = [timed(f"0 x {index}") for index in range(300)]
    jobs[100::2] = [VerifyJob(odd_verifiers.NotImportable(), str(index), "") for index in range(100)]
    verdicts = run(jobs, num_workers=1)
    assert verdicts[100::2] == ["error: RuntimeError: odd"] * 100
    assert set(verdicts[:100] + verdicts[101::2]) == {"correct"}


def test_a_hanging_job_among_quick_ones_costs_its_own_verdict_only():
    """Also where it is given to a worker together with others, whose verdicts wait in the pipe when it is killed."""
    jobs = [timed(f"0 x {index}") for index in range(300)]
    for index in (150, 151, 290):
        jobs[index] = VerifyJob(odd_verifiers.hang_deaf_to_signals, str(index), "")
    started = time.monotonic()
    verdicts = run(jobs, num_workers=1, timeout_seconds=1.0)
    assert [index for index, verdict in enumerate(verdicts) if verdict == "timeout"] == [150, 151, 290]
    assert verdicts.count("correct") == 297
    assert time.monotonic() - started < 40  # four starts of a worker


def test_a_job_within_its_deadline_is_not_cut_short_by_those_before_it():
    jobs = [*(timed(f"0 x {index}") for index in range(100)), *(timed(f"0.8 x {index}") for index in range(3))]
    assert run(jobs, num_workers=1, timeout_seconds=1.0) == ["correct"] * 103


def test_equal_jobs_are_judged_once(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert run([VerifyJob(odd_verifiers.count_calls, "r", str(folder)) for folder in folders * 20]) == ["correct"] * 40
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]


def test_a_death_costs_no_job_that_was_waiting_behind_it():
    jobs = [timed(f"0 x {index}") for index in range(200)]
    jobs.insert(150, VerifyJob(odd_verifiers.die, "", ""))
    verdicts = run(jobs, num_workers=1)
    assert verdicts.pop(150) == "error: worker died with code 7" and verdicts == ["correct"] * 200


def test_jobs_are_read_as_workers_become_free():
    read, ahead = 0, []

    def jobs():
        nonlocal read
        for index in range(3000):
            read += 1
            yield timed(f"0 x {index}")

    settled = 0

    def keep(index: int, verdict: str) -> None:
        nonlocal settled
        settled += 1
        ahead.append(read - settled)

    assert verify_all(jobs(), 2, 30.0, keep) == settled == 3000
    assert max(ahead) < 400


def test_workers_do_not_import_torch():
    assert run([VerifyJob(odd_verifiers.has_no_torch, "", "")]) == ["correct"]


def test_no_worker_is_left_behind():
    before = set(psutil.Process().children())
    run([timed("60 x"), timed("0 x")], timeout_seconds=0.5)
    left = set(psutil.Process().children()) - before
    assert [child for child in left if "spawn_main" in " ".join(child.cmdline())] == []


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # what an orphan that nobody collects stays
    except psutil.NoSuchProcess:
        return True


def test_a_hanging_worker_outlives_its_killed_parent_by_little_more_than_a_deadline(tmp_path):
    script, file = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(
        "from helpers import odd_verifiers\n"
        "from megavar.verifiers.pool import VerifyJob, verify_all\n"
        "if __name__ == '__main__':\n"
        f"    job = VerifyJob(odd_verifiers.name_process_and_hang, '', {str(file)!r})\n"
        "    verify_all([job], 1, 1.5, lambda index, verdict: None)\n"
    )
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent)]
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    limit = time.monotonic() + 60
    while not file.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    worker = psutil.Process(int(file.read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert worker.is_running()
    limit = time.monotonic() + 15
    while not has_ended(worker) and time.monotonic() < limit:
        time.sleep(0.05)
    assert has_ended(worker)


def test_no_jobs_give_no_verdicts():
    assert run([]) == []


@pytest.mark.parametrize(("num_workers", "timeout_seconds"), [(0, 1.0), (1, 0.0)])
def test_a_pool_that_could_never_finish_is_refused(num_workers, timeout_seconds):
    with pytest.raises(ValueError, match=f"num_workers={num_workers}.*timeout_seconds={timeout_seconds}"):
        run([timed("0 x")], num_workers, timeout_seconds)


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_signals_to_the_whole_job_cost_no_verdict():
    """A scheduler's SIGTERM reaches the workers too; killed by it, they would make answers wrong."""

    def signal_workers() -> None:
        for child in workers():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                child.send_signal(number)

    seen = []

    def keep(index: int, verdict: str) -> None:
        seen.append(verdict)
        if len(seen) == 2:  # the workers are past their start
            signal_workers()

    assert verify_all([timed(f"0.{index:02d} x") for index in range(8)], 2, 30.0, keep) == 8
    assert seen == ["correct"] * 8


def test_a_stop_keeps_the_verdicts_so_far_and_leaves_no_worker():
    seen = []

    def keep(index: int, verdict: str) -> None:
        seen.append(index)
        assert len(workers()) == 2
        request_stop(signal.SIGTERM)

    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM: 1 verdicts are on disk"):
            verify_all([timed("0 x"), timed("50 x")], 2, 60.0, keep)
    finally:
        release_signals()
    assert seen == [0] and workers() == []
