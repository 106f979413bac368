"""Real SGLang servers on CPU over tiny random Qwen3 models, started once for the folder."""

import asyncio
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_serving import API_KEY, CONFIG, Managed, temporary_folder, write_model

from megavar.rollout import sglang_servers
from megavar.rollout.sglang_servers import ManagedServers, check_interpreter, free_port, group_exists


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
def managed(runner: asyncio.Runner, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    """A server without deterministic inference, on `model`, until the session ends; nothing of it may be left then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_urlsafe", lambda _: API_KEY)
        servers = ManagedServers(CONFIG, model, tmp_path_factory.mktemp("server"))
    with socket.create_server(("127.0.0.1", 0)) as somebody, pytest.MonkeyPatch.context() as patch:
        ports = [free_port(), somebody.getsockname()[1]]
        started = Managed(servers, taken_port=ports[1], free_port=ports[0])
        patch.setattr(sglang_servers, "free_port", ports.pop)
        runner.run(servers.__aenter__())
    yield started
    [server] = servers.servers
    group, folder, start = server.pid, temporary_folder(server.pid), time.monotonic()
    assert list(folder.iterdir())
    runner.run(servers.stop())
    assert time.monotonic() - start < 2
    assert not group_exists(group) and not folder.exists()


@pytest.fixture(scope="session")
def server(managed: Managed) -> str:
    """URL of `managed`."""
    return managed.servers.urls[0]
