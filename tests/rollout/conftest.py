"""Real SGLang servers on CPU over tiny random Qwen3 models, started once for the folder."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_serving import CONFIG, write_model

from megavar.config.schema import RolloutConfig
from megavar.rollout.sglang_servers import ManagedServers, check_interpreter, group_exists


@pytest.fixture(scope="session", autouse=True)
def sglang_installed() -> None:
    """These tests prove claims about the real server; without it they fail, they do not skip."""
    try:
        check_interpreter(CONFIG.python)
    except ValueError as error:
        pytest.fail(f"the rollout tests need SGLang: {error}", pytrace=False)


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the session, since the servers outlive a test."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the servers start with."""
    return write_model(tmp_path_factory.mktemp("models") / "first", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same architecture."""
    return write_model(tmp_path_factory.mktemp("models") / "second", seed=1)


@pytest.fixture(scope="session")
def managed(runner: asyncio.Runner, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedServers]:
    """A server without deterministic inference, on `model`."""
    yield from start(runner, CONFIG, model, tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def server(managed: ManagedServers) -> str:
    """URL of `managed`."""
    return managed.urls[0]


@pytest.fixture(scope="session")
def seeded_server(runner: asyncio.Runner, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server with deterministic inference, on `model`."""
    config = replace(CONFIG, deterministic=True)
    for servers in start(runner, config, model, tmp_path_factory.mktemp("seeded_server")):
        yield servers.urls[0]


def start(runner: asyncio.Runner, config: RolloutConfig, model: Path, log_dir: Path) -> Iterator[ManagedServers]:
    """Managed servers until the session ends, when nothing of them may be left."""
    servers = ManagedServers(config, model, log_dir)
    runner.run(servers.__aenter__())
    yield servers
    groups = [server.pid for server in servers.servers]
    runner.run(servers.stop())
    assert not any(group_exists(group) for group in groups)
