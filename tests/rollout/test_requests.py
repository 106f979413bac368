"""How many requests are taken at a time: as many as the engine has use for, since other nodes may ask for the rest."""

import asyncio

import numpy as np
import pytest

from megavar.rollout.engine import GenerateRequest, Generation, RolloutError
from megavar.rollout.requests import RequestsFailed, run_requests

NO_TOKENS = np.zeros(0, np.int32)


class WaitingEngine:
    """An engine whose requests wait until they are let go."""

    capacity = 4

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        gate = asyncio.get_running_loop().create_future()
        self.waiting.append(gate)
        await gate
        return [Generation(NO_TOKENS, None, "stop", "", seed) for seed in range(request.num_samples)]


@pytest.mark.parametrize(("num_samples", "taken"), [(1, 4), (2, 2), (3, 2), (8, 1)])
def test_requests_are_taken_only_while_the_engine_has_capacity(num_samples, taken):
    pulled: list[int] = []
    finished: list[int] = []

    def requests():
        for number in range(6):
            pulled.append(number)
            yield number, GenerateRequest([1], 1, 1.0, num_samples=num_samples)

    async def work() -> None:
        engine = WaitingEngine()
        running = asyncio.create_task(
            run_requests(
                engine, requests(), lambda key, _: finished.append(key), description="test", show_progress=False
            )
        )
        await asyncio.sleep(0.01)
        assert len(pulled) == len(engine.waiting) == taken
        engine.waiting.pop(0).set_result(None)
        await asyncio.sleep(0.01)
        frees = 1 if (taken - 1) * num_samples < engine.capacity else 0
        assert finished == [0] and len(pulled) == taken + frees
        while not running.done():
            for gate in engine.waiting:
                gate.set_result(None)
            engine.waiting.clear()
            await asyncio.sleep(0)
        assert (await running).num_requests == 6

    asyncio.run(work())
    assert sorted(finished) == list(range(6))


def test_a_request_that_fails_makes_room_for_the_next():
    async def work() -> None:
        engine = WaitingEngine()
        engine.capacity = 1
        requests = [(number, GenerateRequest([1], 1, 1.0)) for number in range(2)]
        running = asyncio.create_task(
            run_requests(engine, requests, lambda *_: None, description="test", show_progress=False)
        )
        await asyncio.sleep(0.01)
        engine.waiting.pop().set_exception(RolloutError("given up"))
        await asyncio.sleep(0.01)
        engine.waiting.pop().set_result(None)
        with pytest.raises(RequestsFailed, match="1 requests failed, 1 finished") as failed:
            await running
        assert failed.value.keys == [0]

    asyncio.run(work())
