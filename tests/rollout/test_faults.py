"""What happens when servers fail, and which servers are refused."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.faulty import in_front_of
from helpers.tiny_serving import client, write_model

from megavar.rollout import workers
from megavar.rollout.engine import GenerateRequest, Generation, NoWorkerLeft, RequestRejected, RolloutError
from megavar.rollout.requests import RequestsFailed, Throughput, run_requests
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_servers import free_port

pytestmark = pytest.mark.sglang
REQUEST = GenerateRequest([40, 41, 42], max_tokens=8, temperature=0.0)


async def run_many(
    engine: SGLangEngine, requests: list[GenerateRequest], results: dict[int, list[Generation]]
) -> Throughput:
    return await run_requests(
        engine, list(enumerate(requests)), results.__setitem__, description="test", show_progress=False
    )


def test_a_request_is_tried_again_after_500_and_reset(runner: asyncio.Runner, server: str, model: Path) -> None:
    async def run() -> tuple[list[Generation], int]:
        async with in_front_of(server, ["500", "reset", "500"]) as faulty, client(faulty.url) as engine:
            await engine.check_model(model)
            return await engine.generate(REQUEST), faulty.num_generate

    generations, num_tries = runner.run(run())
    assert generations[0].finish == "length" and num_tries == 4


def test_a_request_is_given_up_after_its_retries(runner: asyncio.Runner, server: str, model: Path) -> None:
    async def run() -> None:
        async with in_front_of(server, always="500") as faulty, client(faulty.url, max_retries=1) as engine:
            await engine.check_model(model)
            await engine.generate(REQUEST)

    with pytest.raises(RolloutError, match=r"gave up after 2 tries.*HTTP 500: 'provoked'"):
        runner.run(run())


def test_a_rejected_request_is_not_tried_again(runner: asyncio.Runner, server: str, model: Path) -> None:
    async def run() -> int:
        async with in_front_of(server) as faulty, client(faulty.url) as engine:
            await engine.check_model(model)
            with pytest.raises(RequestRejected):
                await engine.generate(replace(REQUEST, max_tokens=10_000))
            return faulty.num_generate

    assert runner.run(run()) == 1


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_failing_server_of_two_is_left_out(runner: asyncio.Runner, server: str, model: Path, fault: str) -> None:
    async def run() -> tuple[Throughput, int, int]:
        async with (
            in_front_of(server, always=fault) as broken,
            in_front_of(server) as healthy,
            client(broken.url, healthy.url) as engine,
        ):
            await engine.check_model(model)
            for worker in engine._workers.all:
                worker.pause_seconds = 600.0  # else a busy machine, slower than the first pause, tries it once more
            results: dict[int, list[Generation]] = {}
            done = await run_many(engine, [REQUEST] * 100, results)
            assert len(results) == 100
            return done, broken.num_generate, healthy.num_generate

    done, num_broken, num_healthy = runner.run(run())
    assert (done.num_requests, done.num_samples, done.num_tokens) == (100, 100, 800)
    # The broken one saw at most its first share of the concurrent requests, and a few until three had failed.
    assert num_broken < 50 and num_healthy == 100


def test_without_any_server_left_the_error_says_why(
    runner: asyncio.Runner, server: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "REVIVALS_UNTIL_DEAD", 1)

    async def run() -> None:
        async with in_front_of(server) as faulty, client(faulty.url) as engine:
            await engine.check_model(model)
            faulty.target, faulty.always = f"http://127.0.0.1:{free_port()}", "reset"
            await engine.generate(REQUEST)

    with pytest.raises(NoWorkerLeft, match="none of the 1 SGLang servers answers any more: http"):
        runner.run(run())


def test_what_finished_is_kept_when_others_fail(runner: asyncio.Runner, server: str, model: Path) -> None:
    requests = [REQUEST, replace(REQUEST, prompt_ids=[]), REQUEST, replace(REQUEST, max_tokens=10_000), REQUEST]
    results: dict[int, list[Generation]] = {}

    async def run() -> None:
        async with client(server) as engine:
            await engine.check_model(model)
            await run_many(engine, requests, results)

    with pytest.raises(RequestsFailed, match="2 requests failed, 3 finished and are kept") as caught:
        runner.run(run())
    assert sorted(results) == [0, 2, 4] and sorted(caught.value.keys) == [1, 3]  # type: ignore[type-var]


def test_an_error_of_the_receiver_ends_the_run(runner: asyncio.Runner, server: str, model: Path) -> None:
    def full_disk(key: int, generations: list[Generation]) -> None:
        raise OSError("disk full")

    async def run() -> None:
        async with client(server) as engine:
            await engine.check_model(model)
            await run_requests(engine, [(0, REQUEST), (1, REQUEST)], full_disk, description="test")

    with pytest.raises(OSError, match="disk full"):
        runner.run(run())


def test_a_server_of_another_model_is_refused(
    runner: asyncio.Runner, server: str, other_model: Path, model: Path, tmp_path: Path
) -> None:
    async def check(expected: Path, url: str = server) -> None:
        async with client(url) as engine:
            await engine.check_model(expected)

    with pytest.raises(ValueError, match=f"serves '{model}', expected {other_model}"):
        runner.run(check(other_model))
    for rows in (511, 513):
        # The same path with another vocabulary: what a checkpoint overwritten in place looks like.
        write_model(tmp_path / "overwritten", seed=0, vocab_size=rows)
        alias = tmp_path / f"alias{rows}"
        alias.symlink_to(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megavar.rollout.sglang_client.read_vocab_size", lambda _, rows=rows: rows)
            with pytest.raises(ValueError, match=f"another vocabulary than the expected {rows} rows"):
                runner.run(check(alias))
    with pytest.raises(RolloutError, match="is an SGLang server running there"):
        runner.run(check(model, f"http://127.0.0.1:{free_port()}"))
