"""Managed servers: started, restarted, stopped, and never left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from helpers.tiny_serving import API_KEY, CONFIG, Managed, client, temporary_folder

from megavar.rollout import sglang_servers as servers_module
from megavar.rollout.engine import GenerateRequest, Generation, RolloutError
from megavar.rollout.requests import run_requests
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_servers import ManagedServers, check_interpreter, device_slices, external_key, open_engine

pytestmark = pytest.mark.sglang
GREEDY = GenerateRequest([40, 41, 42], max_tokens=64, temperature=0.0)


def processes_of_group(group: int) -> list[psutil.Process]:
    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return [process for process in psutil.process_iter() if belongs(process)]


def wait_until_gone(group: int, seconds: float) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := processes_of_group(group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_killed_server_is_restarted_with_the_loaded_weights_and_all_requests_finish(
    runner: asyncio.Runner, managed: Managed, model: Path, other_model: Path
) -> None:
    results: dict[int, list[Generation]] = {}
    [server] = managed.servers.servers
    folder = temporary_folder(server.pid)

    async def run() -> tuple[list[int], list[int]]:
        async with engine_of(managed, request_timeout_seconds=60) as engine:
            await engine.check_model(model)
            [first] = await engine.generate(GREEDY)
            await engine.load_weights(other_model)
            [second] = await engine.generate(GREEDY)

            def on_result(key: int, generations: list[Generation]) -> None:
                results[key] = generations
                if len(results) == 10:
                    os.killpg(server.pid, signal.SIGKILL)

            requests = [(key, GREEDY) for key in range(60)]
            await run_requests(engine, requests, on_result, description="killed", show_progress=False)
            await engine.load_weights(model)  # for the tests after this one
            return first.ids.tolist(), second.ids.tolist()

    first, second = runner.run(run())
    assert first != second
    assert server.num_restarts == 1 and not folder.exists()
    assert [generations[0].ids.tolist() for generations in results.values()] == [second] * 60


def test_a_server_that_hangs_is_restarted_and_all_requests_finish(
    runner: asyncio.Runner, managed: Managed, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers_module, "HEALTH_TIMEOUT_SECONDS", 2)
    results: dict[int, list[Generation]] = {}
    [server] = managed.servers.servers
    num_restarts, folder = server.num_restarts, temporary_folder(server.pid)

    async def run() -> None:
        async with engine_of(managed, request_timeout_seconds=3) as engine:
            await engine.load_weights(model)

            def on_result(key: int, generations: list[Generation]) -> None:
                results[key] = generations
                if len(results) == 10:
                    os.killpg(server.pid, signal.SIGSTOP)

            requests = [(key, GREEDY) for key in range(60)]
            await run_requests(engine, requests, on_result, description="stopped", show_progress=False)

    runner.run(run())
    assert server.num_restarts == num_restarts + 1 and not folder.exists()
    assert len({tuple(generations[0].ids.tolist()) for generations in results.values()}) == 1 and len(results) == 60


def engine_of(managed: Managed, request_timeout_seconds: float) -> SGLangEngine:
    return SGLangEngine(
        managed.servers.urls,
        concurrency=8,
        request_timeout_seconds=request_timeout_seconds,
        max_retries=2,
        deterministic=False,
        api_key=managed.servers.api_key,
        restart=managed.servers.restart,
    )


PARENT = """
import asyncio, json, sys
from pathlib import Path
from megavar.config.schema import RolloutConfig
from megavar.rollout.sglang_servers import ManagedServers

async def main():
    servers = ManagedServers(RolloutConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
    async with servers:
        print(servers.servers[0].pid, servers.urls[0], servers.api_key, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_deterministic_server_repeats_seeds_and_does_not_outlive_its_killed_parent(
    runner: asyncio.Runner, model: Path, tmp_path: Path
) -> None:
    config = json.dumps(asdict(replace(CONFIG, deterministic=True)))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, config, str(model), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        group, url, api_key = parent.stdout.readline().split()
        processes = processes_of_group(int(group))
        assert len(processes) >= 4  # watchdog, HTTP server, scheduler, detokenizer
        assert not any("/dev/shm/" in Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
        folder = temporary_folder(int(group))
        assert folder.exists()
        check_seeds(runner.run(sample_with_seeds(url, api_key, model)))
    finally:
        parent.kill()
        parent.wait()
    assert not wait_until_gone(int(group), seconds=15) and not folder.exists()


async def sample_with_seeds(url: str, api_key: str, model: Path) -> list[list[Generation]]:
    request = replace(GREEDY, max_tokens=16, temperature=0.7, seed=11, num_samples=4)
    async with client(url, api_key=api_key, deterministic=True) as engine:
        await engine.check_model(model)
        first = await engine.generate(request)
        again = await engine.generate(request)
        # Among others, in another batch; and one sample asked for on its own.
        crowd = await asyncio.gather(*(engine.generate(replace(request, seed=seed)) for seed in (11, 12, 13)))
        alone = await engine.generate(replace(request, seed=first[2].seed, num_samples=1))
        return [first, again, *crowd, alone]


def check_seeds(samples: list[list[Generation]]) -> None:
    first, again, crowded, other, _, alone = [
        [generation.ids.tolist() for generation in generations] for generations in samples
    ]
    assert first == again == crowded
    assert alone == [first[2]]
    assert len({tuple(ids) for ids in first + other}) == 8


def test_a_server_that_dies_at_start_is_reported_with_the_end_of_its_log(
    runner: asyncio.Runner, model: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, server_args=["--no-such-option"])

    async def run() -> None:
        async with ManagedServers(config, model, tmp_path):
            pass

    with pytest.raises(RolloutError, match=r"(?s)ended before it was healthy.*unrecognized arguments: --no-such"):
        runner.run(run())


def test_a_port_taken_meanwhile_is_exchanged(managed: Managed) -> None:
    assert managed.servers.urls == [f"http://127.0.0.1:{managed.free_port}"]
    assert str(managed.taken_port) in managed.servers.servers[0].log.read_text()


def test_a_server_answers_only_those_who_know_its_key_which_nothing_shows(
    runner: asyncio.Runner, managed: Managed, model: Path
) -> None:
    [server], key = managed.servers.servers, managed.servers.api_key

    def statuses(api_key: str | None) -> list[int]:
        headers = {"content-type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        calls = [
            ("/generate", {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}),
            ("/update_weights_from_disk", {"model_path": "/nowhere"}),
            ("/weights_checker", {"action": "checksum"}),
            ("/model_info", None),
            ("/server_info", None),
            ("/health", None),
        ]
        return [status(server.url + path, body, headers) for path, body in calls]

    async def check_without_key() -> None:
        async with client(server.url, api_key=None) as engine:
            await engine.check_model(model)

    assert statuses(None) == statuses(key + "x") == [401] * 5 + [200]
    assert statuses(key) == [200, 400, 200, 200, 200, 200]
    with pytest.raises(
        ValueError, match=r"HTTP 401, the server wants an API key and got none; see rollout\.api_key_env"
    ):
        runner.run(check_without_key())
    assert "'api_key': '***'" in server.log.read_text()
    assert not [file for file in server.log.parent.rglob("*") if key.encode() in file.read_bytes()]
    processes = processes_of_group(server.pid)
    assert len(processes) >= 4 and not [process for process in processes if key in " ".join(process.cmdline())]
    assert all(Path(f"/proc/{process.pid}/environ").stat().st_mode & 0o077 == 0 for process in processes)


def status(url: str, body: object, headers: dict[str, str]) -> int:
    """HTTP status of a request: POST if it has a body."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_missing_pieces_are_reported_before_anything_starts(model: Path, tmp_path: Path) -> None:
    def check(message: str, model: Path = model, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            ManagedServers(replace(CONFIG, **changes), model, tmp_path)  # type: ignore[arg-type]

    check("rollout.python=/no/python is not an executable; run `make sglang`", python="/no/python")
    check("has no config.json", model=tmp_path)
    check("rollout.tensor_parallel_size=2 needs GPUs", tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"cannot import sglang; run `make sglang`, or set rollout\.python"):
        check_interpreter(sys.executable)


def test_servers_get_disjoint_devices() -> None:
    assert device_slices(["4", "5", "6", "7"], 2, 2) == [["4", "5"], ["6", "7"]]
    assert device_slices([], 2, 1) == [[], []]
    with pytest.raises(ValueError, match=r"rollout\.num_servers=3 x rollout\.tensor_parallel_size=2 need 6 GPUs"):
        device_slices(["0", "1", "2", "3"], 3, 2)


def test_the_command_on_gpus_names_devices_and_types_but_no_key(model: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, dtype="bfloat16", tensor_parallel_size=2, deterministic=True, max_total_tokens=None)
    server = servers_module.Server(0, config, model, tmp_path, gpus=["2", "3"], api_key="key")
    assert " ".join(server._command()[1:]) == (
        f"{servers_module.FOLDER}/sglang_launcher.py --model-path {model} --host 127.0.0.1 --port 0 --dtype bfloat16 "
        "--tensor-parallel-size 2 --sleep-on-idle --enable-deterministic-inference"
    )
    released = replace(config, between_stages="release")
    on_gpu, on_cpu = (
        servers_module.Server(0, released, model, tmp_path, gpus, "key")._command() for gpus in (["2"], [])
    )
    assert "--enable-memory-saver" in on_gpu and "--enable-memory-saver" not in on_cpu


def test_a_key_comes_from_a_file_that_others_may_not_read(tmp_path: Path) -> None:
    file = tmp_path / "key"
    config = replace(CONFIG, mode="external", urls=["http://host:1"], api_key_file=str(file))

    def check(message: str) -> None:
        with pytest.raises(ValueError, match=rf"rollout\.api_key_file={file}.*{message}"):
            external_key(config)

    check("is no file")
    file.touch(mode=0o600)
    check("holds no key")
    file.write_text("the-key\n")
    assert external_key(config) == "the-key"
    file.chmod(0o640)
    check(f"may be read by other users; run chmod 600 {file}")


def test_an_external_server_is_taken_as_it_is_or_reloaded_if_we_loaded_it_before(
    runner: asyncio.Runner,
    server: str,
    model: Path,
    other_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, mode="external", urls=[server], api_key_env="KEY_OF_MY_SERVERS")
    with pytest.raises(ValueError, match=r"rollout\.api_key_env=KEY_OF_MY_SERVERS, but this variable is not set"):
        external_key(config)
    monkeypatch.setenv("KEY_OF_MY_SERVERS", API_KEY)

    async def sample(expected: Path) -> list[int]:
        async with open_engine(config, expected, tmp_path) as engine:
            [generation] = await engine.generate(GREEDY)
            return generation.ids.tolist()

    async def load(weights: Path) -> None:
        async with open_engine(config, model, tmp_path) as engine:
            await engine.load_weights(weights)

    first = runner.run(sample(model))
    runner.run(load(other_model))  # as a run does that stops there
    assert runner.run(sample(model)) == first
