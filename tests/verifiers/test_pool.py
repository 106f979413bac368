"""Deadlines, crashes and order of the verifier pool, with real processes."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import odd_verifiers

from megavar.verifiers.pool import VerifyJob, verify_all


def run(jobs, num_workers=2, timeout_seconds=30.0):
    seen = {}
    verdicts = verify_all(jobs, num_workers, timeout_seconds, lambda index, verdict: seen.setdefault(index, verdict))
    assert [seen[index] for index in range(len(jobs))] == verdicts
    return verdicts


def timed(response, gold="x"):
    return VerifyJob(odd_verifiers.sleep_then_match, response, gold)


def test_verdicts_stay_with_their_jobs_whatever_finishes_first():
    jobs = [timed("0.6 x"), timed("0 y"), timed("0.3 y"), timed("0 x"), timed("0.01 x")]
    assert run(jobs) == ["correct", "wrong", "wrong", "correct", "correct"]


def test_a_hanging_job_costs_its_deadline_and_no_more():
    jobs = [timed("60 x"), *(timed(f"0.0{index} x") for index in range(1, 6))]
    started = time.monotonic()
    assert run(jobs, num_workers=1, timeout_seconds=1.0) == ["timeout"] + ["correct"] * 5
    assert time.monotonic() - started < 20  # two starts of a worker, not sixty seconds


@pytest.mark.parametrize(
    ("verifier", "verdict"),
    [(odd_verifiers.die, "error: worker died with code 7"), (odd_verifiers.fail, "error: RuntimeError: odd")],
)
def test_a_crash_or_an_exception_touches_its_own_row_only(verifier, verdict):
    jobs = [timed("0 x"), VerifyJob(verifier, "0 x", "x"), timed("0.1 x"), timed("0.2 y")]
    assert run(jobs) == ["correct", verdict, "correct", "wrong"]


def test_equal_jobs_are_judged_once():
    started = time.monotonic()
    verdicts = verify_all([timed("1 x")] * 40, 1, 30.0, lambda index, verdict: None)
    assert verdicts == ["correct"] * 40 and time.monotonic() - started < 25


def test_no_jobs_give_no_verdicts():
    assert run([]) == []
