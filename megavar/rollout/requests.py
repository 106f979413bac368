"""Runs many requests on an engine, with a progress line, and hands over each result as it comes."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import TypeVar

from megavar.progress import ProgressLine
from megavar.ranks import num_nodes
from megavar.rollout.engine import Engine, GenerateRequest, Generation, NoWorkerLeft, RolloutError

logger = logging.getLogger(__name__)

NUM_ERRORS_SHOWN = 3

Key = TypeVar("Key")


@dataclass
class Throughput:
    """Totals of a run of requests."""

    num_requests: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    """Generated tokens."""
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0


class RequestsFailed(RolloutError):
    """Some requests failed after all retries; the others were finished and handed over."""

    def __init__(self, description: str, num_finished: int, failures: list[tuple[object, Exception]]) -> None:
        self.keys = [key for key, _ in failures]
        """Of the requests that failed; those never started, after the last server had failed, are not among them."""
        shown = "; ".join(f"{key}: {error}" for key, error in failures[:NUM_ERRORS_SHOWN])
        super().__init__(
            f"{description}: {len(failures)} requests failed, {num_finished} finished and are kept. "
            f"The first failures: {shown}"
        )


async def run_requests(
    engine: Engine,
    requests: Iterable[tuple[Key, GenerateRequest]],
    on_result: Callable[[Key, list[Generation]], None],
    *,
    description: str,
    total: int | None = None,
    show_progress: bool = True,
    count: Callable[[int], int] | None = None,
) -> Throughput:
    """Run every request and pass each result to `on_result` as soon as it is there, in order of completion.

    Args:
        engine: after `check_model`.
        requests: consumed lazily: the next one once fewer samples are in flight than the engine has capacity for. What
            is not asked for yet is left to other nodes.
        on_result: called in the event loop, so it must be quick; what it raises ends the run at once.
        description: of the progress line and the errors.
        total: number of requests; None: the length of `requests` if it has one, else the line shows no remaining time.
        show_progress: off on all ranks but one.
        count: adds a number of finished requests to those of other nodes and returns the sum, which is shown.

    Returns:
        The totals of this run.

    Raises:
        RequestsFailed: after all others have finished, if requests failed; early if no server is left.
    """
    if total is None and isinstance(requests, Sized):
        total = len(requests)
    in_flight, freed = 0, asyncio.Event()
    done, failures = Throughput(), list[tuple[object, Exception]]()
    here = "" if num_nodes() == 1 else " on this node"
    start = time.monotonic()

    async def run(key: Key, request: GenerateRequest, progress: ProgressLine) -> None:
        nonlocal in_flight
        try:
            generations = await engine.generate(request)
        except (RolloutError, ValueError) as error:
            failures.append((key, error))
            logger.warning("%s: request %s failed: %s", description, key, error)
            return
        finally:
            in_flight -= request.num_samples
            freed.set()
        on_result(key, generations)
        done.num_requests += 1
        done.num_samples += len(generations)
        done.num_tokens += sum(len(generation.ids) for generation in generations)
        done.seconds = time.monotonic() - start
        shown = done.num_requests if count is None else count(1)
        progress.update(shown, total, f"requests, {done.tokens_per_second:,.0f} tokens/s{here}")

    with ProgressLine(description, show=show_progress) as progress:
        try:
            async with asyncio.TaskGroup() as tasks:
                for key, request in requests:
                    in_flight += request.num_samples
                    tasks.create_task(run(key, request, progress))
                    while in_flight >= max(1, engine.capacity):
                        freed.clear()
                        await freed.wait()
                    if failures and isinstance(failures[-1][1], NoWorkerLeft):
                        break
        except* Exception as group:
            raise first_error(group) from None
    if failures:
        raise RequestsFailed(description, done.num_requests, failures)
    return done


def first_error(group: BaseExceptionGroup[Exception]) -> Exception:
    """The first exception inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
