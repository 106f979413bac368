"""Verdicts from worker processes, each job with a deadline: one that hangs costs its deadline and its worker.

Results belong to jobs by index, never by the order they come in. Workers are spawned and import only this package (no
torch); as with every spawned process, the calling script is imported again too, so it needs its `__main__` guard.
"""

import multiprocessing
import pickle
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from megavar.records import Verdict
from megavar.verifiers import math
from megavar.verifiers.base import Verifier

_START_SECONDS = 180.0
"""Limit for a worker's start, on a slow disk too."""
_GRACE_SECONDS = 2.0
"""A worker ends itself this long after a deadline at which nobody killed it."""
_ERROR_CHARACTERS = 500
_READY, _VERDICT = "ready", "verdict"
_JUDGEMENTS = (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)
"""What a verifier may return; the others are the pool's."""


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

    Raises:
        ValueError: if there is no worker or no time.
        RuntimeError: if workers cannot be started.
    """
    if num_workers < 1 or timeout_seconds <= 0:
        raise ValueError(f"num_workers={num_workers} must be at least 1, timeout_seconds={timeout_seconds} above 0.")
    indices_of: dict[VerifyJob, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        indices_of[job].append(index)
    pending, verdicts = deque(indices_of), [""] * len(jobs)

    def settle(job: VerifyJob, verdict: str) -> None:
        for index in indices_of[job]:
            verdicts[index] = verdict
            on_verdict(index, verdict)

    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(pending))):
            workers.append(_Worker())
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
    until = min(worker.deadline for worker in workers) - time.monotonic()
    wait([worker.connection for worker in workers], min(max(0.0, until), 60.0))
    for worker in list(workers):
        verdict = worker.receive()
        if worker.dead:
            worker.kill()
            workers.remove(worker)
            if pending:
                workers.append(_Worker())
        if worker.job and verdict is not None:
            job, worker.job = worker.job, None
            settle(job, verdict)
        if not worker.dead and worker.is_ready and worker.job is None:
            worker.deadline = float("inf")
            if pending:
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
        self.deadline = time.monotonic() + _START_SECONDS
        self.is_ready = False
        self.dead = False

    def give(self, job: VerifyJob, timeout_seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout_seconds
        try:
            self.connection.send((job, timeout_seconds))
        except OSError:
            self.deadline = 0.0  # It died while idle; `receive` finds its exit code.

    def receive(self) -> str | None:
        """The verdict of the worker's job, if there is one now; sets `dead` if the worker died or was late."""
        try:
            if self.connection.poll():
                kind, verdict = self.connection.recv()
                self.is_ready = True
                return str(verdict) if kind == _VERDICT else None
            if time.monotonic() < self.deadline:
                return None
            reason = f"did not start in {_START_SECONDS:.0f} seconds"
            verdict = str(Verdict.TIMEOUT)
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"died with code {self.process.exitcode}"
            # The worker's own alarm, where this process was too busy to come first.
            verdict = str(Verdict.TIMEOUT) if self.process.exitcode == -signal.SIGALRM else f"error: worker {reason}"
        self.dead = True
        if not self.is_ready:
            raise RuntimeError(
                f"a verifier worker {reason} before it was ready; see its message above, and check that the calling "
                "script has its `if __name__ == '__main__'` guard."
            )
        return verdict

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """Worker: judge jobs until the parent is gone."""
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # math-verify takes seconds to import, which is not the first job's fault.
    math.verify("\\boxed{1}", "1")
    try:
        connection.send((_READY, ""))
        while True:
            connection.send((_VERDICT, _judge_next(connection)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _judge_next(connection: Connection) -> str:
    message = connection.recv_bytes()
    try:
        job, timeout_seconds = pickle.loads(message)
        # If the parent dies now, a verifier that hangs, even in C code, must not outlive it for long.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _GRACE_SECONDS)
        verdict = job.verifier(job.response, job.gold)
        if verdict not in _JUDGEMENTS:
            return f"error: the verifier returned {verdict!r}, expected one of {', '.join(_JUDGEMENTS)}"
        return str(verdict)
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
