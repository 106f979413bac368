"""Verdicts from worker processes, each job with a deadline: one that hangs costs its deadline and its worker.

Results belong to jobs by index, never by the order they come in.
"""

import multiprocessing
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megavar.verifiers.base import Verifier

_READY = "ready"


@dataclass(frozen=True)
class VerifyJob:
    """One response to judge."""

    verifier: Verifier
    """A function at the top of a module, which the worker imports by name."""
    response: str
    gold: str


def verify_all(
    jobs: Sequence[VerifyJob],
    num_workers: int,
    timeout_seconds: float,
    on_verdict: Callable[[int, str], None],
) -> list[str]:
    """Judge all jobs; equal jobs are judged once.

    Args:
        timeout_seconds: deadline of one job, counted from the moment a running worker takes it.
        on_verdict: called with (index of the job, verdict) as verdicts come.

    Returns:
        A verdict a job, in the order of `jobs`: `correct`, `wrong`, `no_answer`, `timeout` or `error: ...`.
    """
    indices_of: dict[VerifyJob, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        indices_of[job].append(index)
    pending, verdicts = deque(indices_of), [""] * len(jobs)

    def settle(job: VerifyJob, verdict: str) -> None:
        for index in indices_of[job]:
            verdicts[index] = verdict
            on_verdict(index, verdict)

    workers = [_Worker() for _ in range(min(num_workers, len(pending)))]
    try:
        while pending or any(worker.job for worker in workers):
            _advance(workers, pending, timeout_seconds, settle)
    finally:
        for worker in workers:
            worker.kill()
    return verdicts


def _advance(
    workers: list["_Worker"],
    pending: deque[VerifyJob],
    timeout_seconds: float,
    settle: Callable[[VerifyJob, str], None],
) -> None:
    """Take in what arrives until the next deadline, hand out new jobs, replace workers that died or were late."""
    now = time.monotonic()
    deadlines = [worker.deadline for worker in workers if worker.job]
    wait([worker.connection for worker in workers], max(0.0, min(deadlines, default=now + 1.0) - now))
    for position, worker in enumerate(workers):
        verdict = worker.receive()
        if verdict is None and worker.job and time.monotonic() >= worker.deadline:
            verdict, worker.dead = "timeout", True
        if verdict is not None and worker.job:
            settle(worker.job, verdict)
            worker.job = None
        if worker.dead:
            worker.kill()
            if verdict is None and not worker.was_ready:
                raise RuntimeError("a verifier worker died before it was ready; see its message above")
            workers[position] = _Worker()
        elif worker.was_ready and worker.job is None and pending:
            worker.give(pending.popleft(), timeout_seconds)


class _Worker:
    """One process and the job it has."""

    def __init__(self) -> None:
        # Spawned: the caller may hold threads of gloo or CUDA, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: VerifyJob | None = None
        self.deadline = 0.0
        self.was_ready = False
        self.dead = False

    def give(self, job: VerifyJob, timeout_seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout_seconds
        try:
            self.connection.send(job)
        except OSError:
            self.deadline = 0.0

    def receive(self) -> str | None:
        """The verdict of the worker's job, if it is there; a worker that died gives its exit code."""
        if not self.connection.poll():
            return None
        try:
            message: Any = self.connection.recv()
        except (EOFError, OSError):
            self.dead = True
            self.process.join(5)
            return f"error: worker died with code {self.process.exitcode}" if self.job else None
        if message == _READY:
            self.was_ready = True
            return None
        return str(message)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """Worker: judge jobs until the parent is gone."""
    _import_slow_parts()
    connection.send(_READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            verdict: str = job.verifier(job.response, job.gold)
        except Exception as error:
            verdict = f"error: {type(error).__name__}: {error}"
        connection.send(verdict)


def _import_slow_parts() -> None:
    """math-verify takes seconds to import, which is not the first job's fault."""
    import math_verify  # noqa: F401
