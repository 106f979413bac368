"""Which request gets a server next."""

import asyncio

import pytest

from megavar.rollout import workers
from megavar.rollout.engine import NoWorkerLeft
from megavar.rollout.workers import Worker, Workers


async def never_back(worker: Worker) -> None:
    raise ConnectionError("gone")


class Requests:
    """Requests that each keep their worker until they are told to finish."""

    def __init__(self, workers: Workers) -> None:
        self.workers, self.served = workers, list[str]()
        self.finish: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, num_samples: int) -> None:
        self.finish[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, num_samples))
        await settle()

    async def _run(self, name: str, num_samples: int) -> None:
        async with self.workers.lease(num_samples):
            self.served.append(name)
            await self.finish[name].wait()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_requests_get_servers_in_order_of_arrival_within_the_capacity() -> None:
    async def main() -> None:
        requests = Requests(Workers(["a", "b"], 4, never_back))
        for name, num_samples in [("1", 4), ("2", 3), ("3", 2), ("4", 1), ("5", 9)]:
            await requests.start(name, num_samples)
        assert requests.served == ["1", "2"]  # "4" would fit beside "2", but "3" came before it
        requests.finish["1"].set()
        await settle()
        assert requests.served == ["1", "2", "3", "4"]
        assert [worker.samples_in_flight for worker in requests.workers.all] == [3, 3]
        requests.finish["3"].set()
        await settle()
        assert "5" not in requests.served  # more samples than any server takes at once: it waits for an idle one
        requests.finish["4"].set()
        await settle()
        assert requests.served[-1] == "5"
        for name in ("2", "5"):
            requests.finish[name].set()
        await settle()
        assert [worker.samples_in_flight for worker in requests.workers.all] == [0, 0]

    asyncio.run(main())


def test_a_cancelled_request_keeps_no_capacity_and_holds_nobody_up() -> None:
    async def main() -> None:
        requests = Requests(Workers(["a"], 4, never_back))
        for name, num_samples in [("1", 3), ("2", 4), ("3", 1), ("4", 4)]:
            await requests.start(name, num_samples)
        requests.tasks["2"].cancel()  # while it waits, with a smaller one behind it
        await settle()
        assert requests.served == ["1", "3"]
        requests.finish["3"].set()
        await settle()
        requests.finish["1"].set()
        while requests.workers.all[0].samples_in_flight != 4:
            await asyncio.sleep(0)
        requests.tasks["4"].cancel()  # when it was given the server, and has not run yet
        await settle()
        assert requests.served == ["1", "3"] and requests.workers.all[0].samples_in_flight == 0
        await requests.start("5", 4)
        assert requests.served == ["1", "3", "5"]
        requests.tasks["5"].cancel()
        await settle()

    asyncio.run(main())


def test_those_that_wait_are_told_when_no_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(workers, "MAX_PAUSE_SECONDS", 0.001)

    async def main() -> None:
        pool = Workers(["a"], 1, never_back)
        pool.all[0].pause_seconds = 0.001
        requests = Requests(pool)
        for name in ("1", "2", "3"):
            await requests.start(name, 1)
        pool.failed(pool.all[0], "gone", out_of_use=True)
        requests.finish["1"].set()
        results = await asyncio.gather(*requests.tasks.values(), return_exceptions=True)
        assert results[0] is None and requests.served == ["1"]
        assert all(isinstance(error, NoWorkerLeft) and "a: gone" in str(error) for error in results[1:])
        with pytest.raises(NoWorkerLeft):
            async with pool.lease(1):
                pass
        await pool.close()

    asyncio.run(main())
