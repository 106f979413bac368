"""Runs verifiers in a pool of worker processes with a timeout per job; a job that hangs is killed with its worker.

Results are matched to jobs by index, never by completion order. Workers are spawned and import only this package (no
torch). Spawning imports the calling script again, so the script needs its `__main__` guard.
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
from megavar.stopping import SIGNALS, stop_if_requested
from megavar.verifiers import math
from megavar.verifiers.base import Verifier

_START_SECONDS = 180.0
"""Timeout of a worker's start-up; generous, for slow disks."""
_GRACE_SECONDS = 2.0
"""A worker that was not killed at its deadline (its parent is dead or busy) terminates itself after this time."""
_ERROR_CHARACTERS = 500
_STOP_POLL_SECONDS = 0.5
_READY, _VERDICT = "ready", "verdict"
_RETURNABLE = (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)
"""Verdicts that a verifier may return; the pool itself sets the others."""


@dataclass(frozen=True)
class VerifyJob:
    """One response to verify."""

    verifier: Verifier
    """A module-level function: workers import it by name."""
    response: str
    gold: str


def verify_all(
    jobs: Sequence[VerifyJob],
    num_workers: int,
    timeout_seconds: float,
    on_verdict: Callable[[int, str], None],
) -> list[str]:
    """Verify all jobs; identical jobs run once.

    Args:
        num_workers: worker processes.
        timeout_seconds: of one job, from the moment a running worker receives it.
        on_verdict: called with (index into `jobs`, verdict) as verdicts arrive.

    Returns:
        One verdict per job, in the order of `jobs`: `correct`, `wrong`, `no_answer`, `timeout` or `error: ...`.

    Raises:
        ValueError: if `num_workers` or `timeout_seconds` is not positive.
        RuntimeError: if a worker does not start.
        Stopped: if this process was asked to stop; `on_verdict` has got what was verified until then.
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
            stop_if_requested(f"{len(verdicts) - verdicts.count('')} of {len(jobs)} verdicts are on disk")
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
    """Wait until the next result or deadline, collect results, replace dead or timed-out workers, assign new jobs."""
    until = min(worker.deadline for worker in workers) - time.monotonic()
    wait([worker.connection for worker in workers], min(max(0.0, until), _STOP_POLL_SECONDS))
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
    """One worker process and its current job."""

    def __init__(self) -> None:
        # Not forked: threads of gloo or CUDA in the caller do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end,), daemon=True)
        self.process.start()
        child_end.close()
        self.job: VerifyJob | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self.is_ready = False
        self.dead = False

    def give(self, job: VerifyJob, timeout_seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout_seconds
        try:
            self.connection.send((job, timeout_seconds))
        except OSError:
            self.deadline = 0.0  # It died while idle; `receive` reads its exit code.

    def receive(self) -> str | None:
        """The verdict of the current job if it is available; sets `dead` if the worker died or timed out."""
        try:
            if self.connection.poll():
                kind, verdict = self.connection.recv()
                self.is_ready = True
                return str(verdict) if kind == _VERDICT else None
            if time.monotonic() < self.deadline:
                return None
            reason = f"did not start within {_START_SECONDS:.0f} seconds"
            verdict = str(Verdict.TIMEOUT)
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"died with code {self.process.exitcode}"
            # SIGALRM: the worker's own timer fired before this process killed it.
            verdict = str(Verdict.TIMEOUT) if self.process.exitcode == -signal.SIGALRM else f"error: worker {reason}"
        self.dead = True
        if not self.is_ready:
            raise RuntimeError(
                f"a verifier worker {reason} before it was ready; see its output above, and check that the calling "
                "script has an `if __name__ == '__main__'` guard."
            )
        return verdict

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """Main loop of a worker: verify jobs until the parent closes the pipe."""
    # These reach the whole process group or job; the parent stops in order, and kills its workers.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Warm-up: importing math-verify takes seconds, which must not count against the first job's timeout.
    math.verify("\\boxed{1}", "1")
    try:
        connection.send((_READY, ""))
        while True:
            connection.send((_VERDICT, _verify_next(connection)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _verify_next(connection: Connection) -> str:
    message = connection.recv_bytes()
    try:
        job, timeout_seconds = pickle.loads(message)
        # If the parent dies now, a hanging verifier (even in C code) must terminate soon after.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _GRACE_SECONDS)
        verdict = job.verifier(job.response, job.gold)
        if verdict not in _RETURNABLE:
            return f"error: the verifier returned {verdict!r}, expected one of {', '.join(_RETURNABLE)}"
        return str(verdict)
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
