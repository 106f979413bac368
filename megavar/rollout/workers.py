"""The servers a client talks to: which one takes the next request, and which are out of use for now.

Knows no HTTP: `sglang_client.py` reports how requests ended and supplies the coroutine that brings a worker back.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from megavar.rollout.engine import NoWorkerLeft

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
"""Failed answers in a row after which a worker is taken out of use."""
FIRST_PAUSE_SECONDS = 1.0
"""Before the first revival; doubled for each further one until the worker answers a request again."""
MAX_PAUSE_SECONDS = 30.0
REVIVALS_UNTIL_DEAD = 5
"""Failed revivals after which requests no longer wait for a worker (it is still tried, and taken back)."""


@dataclass(eq=False)
class Worker:
    """One server."""

    url: str
    samples_in_flight: int = 0
    failures: int = 0
    """In a row."""
    last_error: str = ""
    pause_seconds: float = FIRST_PAUSE_SECONDS
    available: bool = True
    dead: bool = False
    revival: asyncio.Task[None] | None = field(default=None, repr=False)


class Workers:
    """Hands each request to the available worker with the fewest samples in flight.

    Args:
        urls: base URLs.
        concurrency: samples in flight for each worker.
        revive: brings a worker back (waits, restarts, checks what it serves), or raises.
    """

    def __init__(self, urls: list[str], concurrency: int, revive: Callable[[Worker], Awaitable[None]]) -> None:
        self.all = [Worker(url) for url in urls]
        self._concurrency = concurrency
        self._revive = revive
        self._waiting: deque[tuple[int, asyncio.Future[Worker]]] = deque()
        """Samples of the requests that wait, in order of arrival."""

    @asynccontextmanager
    async def lease(self, num_samples: int) -> AsyncIterator[Worker]:
        """A worker for one request, waiting until one has capacity; one with nothing in flight always has.

        Requests get theirs in order of arrival, also where a later one is smaller.

        Raises:
            NoWorkerLeft: every worker is dead.
        """
        ready: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_samples, ready))
        self._hand_out()
        try:
            yield await ready
        finally:
            ready.cancel()  # if it still waits
            if not ready.cancelled() and ready.exception() is None:
                ready.result().samples_in_flight -= num_samples
            self._hand_out()

    def _hand_out(self) -> None:
        """Give workers to the requests that wait, as far as there is capacity; tell them if no worker is left."""
        while self._waiting:
            num_samples, ready = self._waiting[0]
            if not ready.done():  # else it was cancelled
                worker = self._choose(num_samples)
                if worker is not None:
                    worker.samples_in_flight += num_samples
                    ready.set_result(worker)
                elif all(worker.dead for worker in self.all):
                    ready.set_exception(self._none_left())
                else:
                    return
            self._waiting.popleft()

    def _none_left(self) -> NoWorkerLeft:
        errors = "; ".join(f"{worker.url}: {worker.last_error}" for worker in self.all)
        return NoWorkerLeft(
            f"none of the {len(self.all)} SGLang servers answers any more: {errors} "
            "(docs/troubleshooting.md#requests-fail)"
        )

    def _choose(self, num_samples: int) -> Worker | None:
        def has_capacity(worker: Worker) -> bool:
            return not worker.samples_in_flight or worker.samples_in_flight + num_samples <= self._concurrency

        ready = [worker for worker in self.all if worker.available and has_capacity(worker)]
        return min(ready, key=lambda worker: worker.samples_in_flight, default=None)

    def add(self, url: str) -> None:
        """One more worker."""
        self.all.append(Worker(url))

    def succeeded(self, worker: Worker) -> None:
        """A request was answered."""
        worker.failures, worker.pause_seconds = 0, FIRST_PAUSE_SECONDS

    def failed(self, worker: Worker, error: str, out_of_use: bool) -> None:
        """A request failed by the server's fault.

        Args:
            worker: who failed.
            error: what happened.
            out_of_use: take the worker out of use at once (the connection broke, it serves other weights).
        """
        worker.failures += 1
        worker.last_error = error
        if worker.available and (out_of_use or worker.failures >= MAX_CONSECUTIVE_FAILURES):
            worker.available = False
            logger.warning("SGLang server %s is out of use until it recovers: %s", worker.url, error)
            worker.revival = asyncio.create_task(self._bring_back(worker))

    async def _bring_back(self, worker: Worker) -> None:
        num_revivals = 0
        while True:
            # First of all, since a server that is healthy by its own account and fails every request must not
            # get the next ones at once: failing fast, it would seem the least loaded.
            await asyncio.sleep(worker.pause_seconds)
            worker.pause_seconds = min(2 * worker.pause_seconds, MAX_PAUSE_SECONDS)
            try:
                await self._revive(worker)
                break
            except Exception as error:  # whatever it is, the other workers go on and this one is tried again
                worker.last_error = str(error) or repr(error)
            num_revivals += 1
            if num_revivals >= REVIVALS_UNTIL_DEAD and not worker.dead:
                worker.dead = True
                logger.error("SGLang server %s did not come back: %s", worker.url, worker.last_error)
                self._hand_out()
        worker.failures, worker.dead, worker.available = 0, False, True
        logger.info("SGLang server %s is back in use.", worker.url)
        self._hand_out()

    async def close(self) -> None:
        """Stop trying to bring workers back."""
        tasks = [worker.revival for worker in self.all if worker.revival is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
