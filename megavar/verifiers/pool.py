"""Runs verifiers in a pool of worker processes with a timeout per job; a job that hangs is killed with its worker.

Results are matched to jobs by index, never by completion order. Workers are spawned and import only this package (no
torch). Spawning imports the calling script again, so the script needs its `__main__` guard.
"""

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
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
_MOST_PENDING, _MOST_REMEMBERED = 256, 4096
"""Jobs that are read ahead, and jobs whose verdicts are remembered."""
_MOST_AT_ONCE, _QUICK_SECONDS = 64, 0.05
"""Jobs sent to a worker at once, as long as they take it so little time."""
_QUIET_SECONDS = 0.02
"""A worker wakes its parent when its jobs are done, or when this time has passed since it did so."""
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
    jobs: Iterable[VerifyJob],
    num_workers: int,
    timeout_seconds: float,
    on_verdict: Callable[[int, str], None],
) -> int:
    """Verify all jobs; of identical jobs near each other, one is run.

    Memory does not grow with the number of jobs: they are read as workers become free.

    Args:
        num_workers: worker processes.
        timeout_seconds: of one job, from the moment a running worker begins it.
        on_verdict: called with (index into `jobs`, verdict) as verdicts arrive: `correct`, `wrong`, `no_answer`,
            `timeout` or `error: ...`.

    Returns:
        The number of jobs.

    Raises:
        ValueError: if `num_workers` or `timeout_seconds` is not positive.
        RuntimeError: if a worker does not start.
        Stopped: if this process was asked to stop; `on_verdict` has got what was verified until then.
    """
    if num_workers < 1 or timeout_seconds <= 0:
        raise ValueError(f"num_workers={num_workers} must be at least 1, timeout_seconds={timeout_seconds} above 0.")
    queue = _Queue(jobs, on_verdict)
    workers: list[_Worker] = []
    try:
        while queue.fill() or any(worker.jobs for worker in workers):
            stop_if_requested(f"{queue.num_settled} verdicts are on disk")
            while len(workers) < num_workers and len(workers) < len(queue.pending) + sum(map(_is_busy, workers)):
                workers.append(_Worker())
            _advance(workers, queue, timeout_seconds)
    finally:
        for worker in workers:
            worker.kill()
    return queue.num_read


class _Queue:
    """Jobs that wait for a worker, and where the verdicts of jobs like them go."""

    def __init__(self, jobs: Iterable[VerifyJob], on_verdict: Callable[[int, str], None]) -> None:
        self._jobs, self._on_verdict = enumerate(jobs), on_verdict
        self._indices_of: dict[VerifyJob, list[int]] = {}
        self._settled: OrderedDict[VerifyJob, str] = OrderedDict()
        self.pending: deque[VerifyJob] = deque()
        self.num_read = self.num_settled = 0

    def fill(self) -> bool:
        """Read jobs until enough of them wait; False if none does."""
        while len(self.pending) < _MOST_PENDING and (item := next(self._jobs, None)) is not None:
            index, job = item
            self.num_read += 1
            if (verdict := self._settled.get(job)) is not None:
                self._report(index, verdict)
            elif job in self._indices_of:
                self._indices_of[job].append(index)
            else:
                self._indices_of[job] = [index]
                self.pending.append(job)
        return bool(self.pending)

    def settle(self, job: VerifyJob, verdict: str) -> None:
        """Report the verdict of a job, and remember it for the next ones like it."""
        for index in self._indices_of.pop(job):
            self._report(index, verdict)
        self._settled[job] = verdict
        if len(self._settled) > _MOST_REMEMBERED:
            self._settled.popitem(last=False)

    def _report(self, index: int, verdict: str) -> None:
        self._on_verdict(index, verdict)
        self.num_settled += 1


def _advance(workers: list["_Worker"], queue: _Queue, timeout_seconds: float) -> None:
    """Wait until the next result or deadline, collect results, remove dead or timed-out workers, assign new jobs."""
    until = min(worker.deadline for worker in workers) - time.monotonic()
    wait([worker.connection for worker in workers], min(max(0.0, until), _STOP_POLL_SECONDS))
    for worker in list(workers):
        for verdict in worker.receive(timeout_seconds):
            queue.settle(worker.jobs.popleft(), verdict)
        if worker.dead:
            worker.kill()
            workers.remove(worker)
            queue.pending.extendleft(reversed(worker.jobs))
        elif worker.is_ready and not worker.jobs:
            worker.deadline = float("inf")
            if queue.pending:
                worker.give(queue.pending, timeout_seconds)


def _is_busy(worker: "_Worker") -> bool:
    return bool(worker.jobs)


class _Worker:
    """One worker process and the jobs that it was given: more at once where they take little time.

    It writes each verdict into a pipe at once, so that none is lost with it, but wakes its parent, by an empty message,
    for many at a time.
    """

    def __init__(self) -> None:
        # Not forked: threads of gloo or CUDA in the caller do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, child_end = context.Pipe()
        self._verdicts, verdicts_end = context.Pipe(duplex=False)
        os.set_blocking(self._verdicts.fileno(), False)
        self._unread = b""
        self.process = context.Process(target=_serve, args=(child_end, verdicts_end), daemon=True)
        self.process.start()
        child_end.close()
        verdicts_end.close()
        self.jobs: deque[VerifyJob] = deque()
        self.deadline = time.monotonic() + _START_SECONDS
        self.is_ready = False
        self.dead = False
        self._num_at_once, self._given_at = 1, 0.0

    def give(self, pending: deque[VerifyJob], timeout_seconds: float) -> None:
        """Take the next jobs and send them."""
        now = time.monotonic()
        quick = self._given_at and now - self._given_at < _QUICK_SECONDS
        self._num_at_once = min(2 * self._num_at_once, _MOST_AT_ONCE) if quick else 1
        self.jobs.extend(pending.popleft() for _ in range(min(self._num_at_once, len(pending))))
        self._given_at, self.deadline = now, now + timeout_seconds
        try:
            # Each by itself: one that cannot be read there (a verifier that cannot be imported) costs its own verdict.
            self.connection.send(([pickle.dumps(job) for job in self.jobs], timeout_seconds))
        except OSError:
            self.deadline = 0.0  # It died while idle; `receive` reads its exit code.

    def receive(self, timeout_seconds: float) -> list[str]:
        """The next verdicts, as far as there are any; sets `dead` if the worker died or timed out."""
        reason = verdict = ""
        try:
            while self.connection.poll():
                self.connection.recv_bytes()
                self.is_ready = True
                self.deadline = time.monotonic() + timeout_seconds + _QUIET_SECONDS
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"died with code {self.process.exitcode}"
            # SIGALRM: the worker's own timer fired before this process killed it.
            verdict = str(Verdict.TIMEOUT) if self.process.exitcode == -signal.SIGALRM else f"error: worker {reason}"
        is_late = time.monotonic() >= self.deadline
        verdicts = self._read_verdicts()
        if is_late and verdicts:  # the next job may have just begun, and the message that says so be on its way
            self.deadline = time.monotonic() + _QUIET_SECONDS
        elif is_late and not reason:
            reason, verdict = f"did not start within {_START_SECONDS:.0f} seconds", str(Verdict.TIMEOUT)
        self.dead = bool(reason)
        if self.dead and not self.is_ready:
            raise RuntimeError(
                f"a verifier worker {reason} before it was ready; see its output above, and check that the calling "
                "script has an `if __name__ == '__main__'` guard."
            )
        if self.dead and len(verdicts) < len(self.jobs):
            verdicts.append(verdict)
        return verdicts

    def _read_verdicts(self) -> list[str]:
        """What the worker has written, a JSON string a line."""
        try:
            while data := os.read(self._verdicts.fileno(), 2**16):
                self._unread += data
        except BlockingIOError:
            pass
        *lines, self._unread = self._unread.split(b"\n")
        return list(json.loads(b"[" + b",".join(lines) + b"]"))

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._verdicts.close()


def _serve(connection: Connection, verdicts: Connection) -> None:
    """Main loop of a worker: verify jobs until the parent closes the pipe."""
    # These reach the whole process group or job; the parent stops in order, and kills its workers.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Warm-up: importing math-verify takes seconds, which must not count against the first job's timeout.
    math.verify("\\boxed{x+1}", "1+x")
    try:
        connection.send_bytes(b"")
        while True:
            jobs, timeout_seconds = connection.recv()
            woken = time.monotonic()
            for job in jobs:
                os.write(verdicts.fileno(), json.dumps(_verify(job, timeout_seconds)).encode() + b"\n")
                if (now := time.monotonic()) - woken >= _QUIET_SECONDS:
                    connection.send_bytes(b"")
                    woken = now
            connection.send_bytes(b"")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _verify(message: bytes, timeout_seconds: float) -> str:
    try:
        # If the parent dies now, a hanging verifier (even in C code) must terminate soon after.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _GRACE_SECONDS)
        job = pickle.loads(message)
        verdict = job.verifier(job.response, job.gold)
        if verdict not in _RETURNABLE:
            return f"error: the verifier returned {verdict!r}, expected one of {', '.join(_RETURNABLE)}"
        return str(verdict)
    except Exception as error:
        return _described(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _described(error: Exception) -> str:
    return f"error: {type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
