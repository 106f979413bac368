"""The real sglang-router in front of two real servers: samples through it, weights and checks beside it."""

import asyncio
import json
import logging
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.router import router_of
from helpers.small_run import BASE
from helpers.tiny_serving import CONFIG, client
from transformers import AutoModelForCausalLM

from megavar.config.schema import RolloutConfig, SampleConfig, TemplateConfig
from megavar.data.templates import Templates
from megavar.record_files import read_records
from megavar.records import Question, Sampler, Trace
from megavar.rollout import sglang_client
from megavar.rollout.engine import GenerateRequest
from megavar.rollout.service import RolloutService
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_replies import listed_servers
from megavar.rollout.sglang_servers import ManagedServers, open_engine
from megavar.stages.sample import Loaded, Sampling, sample_traces

pytestmark = pytest.mark.sglang
GREEDY = GenerateRequest([40, 41, 42], max_tokens=24, temperature=0.0)
QUESTIONS = [Question(f"q{number}", f"{number}+{number}", str(2 * number)) for number in range(60)]
NUM_TRACES = 4


@dataclass
class Routed:
    """Two servers of one key behind a router."""

    servers: ManagedServers
    url: str
    config: RolloutConfig

    def ask(self, path: str) -> list[dict[str, object]]:
        """What each server answers."""
        headers = {"Authorization": f"Bearer {self.servers.api_key}"}
        requests = [urllib.request.Request(url + path, headers=headers) for url in self.servers.urls]
        return [json.loads(urllib.request.urlopen(request).read()) for request in requests]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, where the servers find it."""
    return Path(shutil.copytree(BASE, tmp_path_factory.mktemp("models") / "base"))


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """Random weights of the same architecture."""
    folder = Path(shutil.copytree(base, base.with_name("other")))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def routed(runner: asyncio.Runner, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    folder = tmp_path_factory.mktemp("routed")
    servers = ManagedServers(replace(CONFIG, num_servers=2), base, folder)
    runner.run(servers.__aenter__())
    try:
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_text(servers.api_key + "\n")
        with router_of(servers.urls, servers.api_key, folder) as url:
            yield Routed(servers, url, replace(CONFIG, mode="external", urls=[url], api_key_file=str(key)))
    finally:
        runner.run(servers.stop())


async def greedy(engine: SGLangEngine, num_samples: int = 1) -> list[list[int]]:
    return [sample.ids.tolist() for sample in await engine.generate(replace(GREEDY, num_samples=num_samples))]


def test_samples_come_through_the_router_and_weights_go_to_all_of_its_servers(
    runner: asyncio.Runner, routed: Routed, base: Path, other: Path, tmp_path: Path
) -> None:
    async def direct(url: str) -> list[list[int]]:
        async with client(url, api_key=routed.servers.api_key) as engine:
            await engine.check_model(base)
            return await greedy(engine)

    async def through(config: RolloutConfig) -> tuple[list[list[int]], list[list[int]], list[int]]:
        async with open_engine(config, base, tmp_path) as engine:
            assert engine.capacity == 2 * CONFIG.concurrency
            first = await greedy(engine, num_samples=8)
            await engine.load_weights(other)
            samples = await engine.generate(replace(GREEDY, temperature=0.7, seed=5, num_samples=8))
            return first, await greedy(engine, num_samples=8), [sample.seed for sample in samples]

    async def started_with(started: Path) -> list[list[int]]:
        async with open_engine(routed.config, other, tmp_path, base=started) as engine:
            return await greedy(engine)

    expected = [runner.run(direct(url)) for url in routed.servers.urls]
    assert expected[0] == expected[1]
    with pytest.raises(ValueError, match=f"serves '{base}', expected {other}"):
        runner.run(started_with(tmp_path))
    replaced = runner.run(started_with(base))
    first, second, seeds = runner.run(through(routed.config))
    assert first == 8 * expected[0] and second == 8 * replaced and replaced != expected[0]
    assert seeds[0] == 5 and len(set(seeds)) == 8
    assert {info["weight_version"] for info in routed.ask("/model_info")} == {f"megavar:{other}"}
    # The same with the servers named: those weights were ours, and are replaced.
    named = replace(routed.config, worker_urls=routed.servers.urls)
    assert runner.run(through(named))[0] == first


def test_routers_and_servers_are_not_mixed(runner: asyncio.Runner, routed: Routed, base: Path, tmp_path: Path) -> None:
    async def mixed() -> None:
        async with open_engine(replace(routed.config, urls=[routed.url, routed.servers.urls[0]]), base, tmp_path):
            pass

    with pytest.raises(ValueError, match=rf"routers or servers, not both: {routed.url} a router, http.* none\."):
        runner.run(mixed())


def test_no_trace_is_lost_or_doubled_when_a_server_is_killed_under_load_and_it_comes_back_with_the_weights(
    runner: asyncio.Runner,
    routed: Routed,
    base: Path,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sglang_client, "WATCH_SECONDS", 0.2)
    caplog.set_level(logging.INFO, "megavar")
    templates = Templates(BASE, TemplateConfig())
    config = SampleConfig(max_trace_tokens=64, flush_seconds=0.1)
    sampling = Sampling(config, 1, 1, lambda: Loaded(QUESTIONS, templates, templates))
    service = RolloutService(routed.config, base, tmp_path / "servers")
    victim, folder = routed.servers.servers[1], tmp_path / "traces"
    killed_at = list[int]()

    def kill() -> None:
        while not (parts := list(folder.glob("part-*"))):
            time.sleep(0.01)
        killed_at.append(len(parts))
        os.killpg(victim.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    sample_traces(service, other, Sampler.POLICY, NUM_TRACES, sampling, folder)
    assert killed_at, "the server was killed too late"
    traces = read_records(folder / "data.parquet", Trace)
    assert {(trace.question_id, trace.trace_index) for trace in traces} == {
        (question.id, index) for question in QUESTIONS for index in range(NUM_TRACES)
    }
    assert len(traces) == len(QUESTIONS) * NUM_TRACES == len({trace.seed for trace in traces})

    async def greedy_until_back(engine: SGLangEngine) -> list[list[int]]:
        while f"SGLang server {victim.url} is out of use until it recovers" not in caplog.text:
            await asyncio.sleep(0.1)
        [expected] = await greedy(engine)
        await victim.revive()
        while f"SGLang server {victim.url} is back in use." not in caplog.text:
            assert await greedy(engine) == [expected]
        return [expected, *await greedy(engine, num_samples=16)]

    samples = service.run(other, greedy_until_back)
    service.close()
    assert samples == 17 * [samples[0]]
    assert {info["weight_version"] for info in routed.ask("/model_info")} == {f"megavar:{other}"}


def test_servers_that_a_router_names_must_be_reachable_over_http() -> None:
    def listed(*urls: str) -> dict[str, object]:
        return {"workers": [{"url": url} for url in urls]}

    assert listed_servers(listed("http://a:1", "https://b:2"), "http://r") == ["http://a:1", "https://b:2"]
    for answer, message in (
        (listed(), "the router http://r has no servers"),
        (listed("grpc://a:1"), r"lists 'grpc://a:1', which cannot be asked over HTTP; give .* rollout\.worker_urls"),
        (listed("http://a:1@0"), "lists 'http://a:1@0'"),
        ({"urls": []}, "http://r/workers answered .*, expected workers"),
    ):
        with pytest.raises(ValueError, match=message):
            listed_servers(answer, "http://r")
