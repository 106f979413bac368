"""Servers live over the stages of a run on CPUs, and serve what each stage asks for."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.tiny_serving import CONFIG

from megavar.rollout import service as service_module
from megavar.rollout.engine import GenerateRequest
from megavar.rollout.service import RolloutService
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_servers import group_exists
from megavar.stopping import Stopped, release_signals, request_stop

GREEDY = GenerateRequest([40, 41, 42], max_tokens=24, temperature=0.0, return_logps=False)


async def sample(engine: SGLangEngine) -> list[int]:
    [generation] = await engine.generate(GREEDY)
    assert generation.logps is None
    return generation.ids.tolist()


def test_one_start_serves_all_stages_with_the_weights_each_names(model: Path, other_model: Path, tmp_path: Path):
    service = RolloutService(CONFIG, model, tmp_path)
    service.start_early()
    group = int((tmp_path / "server_00.log").is_file() and service._early.servers[0].pid)  # started, not waited for
    assert group_exists(group)
    first = service.run(model, sample)
    service.end_stage()
    second, third = service.run(other_model, sample), service.run(model, sample)
    assert first == third != second
    assert service._early.servers[0].pid == group and os.getpgid(group) == group
    service.close()
    assert not group_exists(group)
    service.close()  # nothing left to do


def test_a_stop_leaves_the_requests_in_flight_and_the_service_can_be_closed(model: Path, tmp_path: Path):
    service, kept = RolloutService(CONFIG, model, tmp_path), []

    async def sample_for_ever(engine: SGLangEngine) -> None:
        while True:
            kept.append(await sample(engine))
            if len(kept) == 2:
                request_stop(signal.SIGUSR1)

    try:
        with pytest.raises(Stopped, match="stopped by SIGUSR1: all finished samples are on disk") as stopped:
            service.run(model, sample_for_ever)
        assert stopped.value.exit_code == 75 and len(kept) >= 2
    finally:
        release_signals()
        service.close()


def test_released_servers_resume_with_the_weights_of_the_next_stage_and_are_replaced_if_they_cannot(
    model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the real server on a CPU, whose memory saver does nothing: that memory is free meanwhile is not seen here."""
    monkeypatch.setattr(service_module, "visible_gpus", lambda: ["0"])
    service = RolloutService(replace(CONFIG, between_stages="release"), model, tmp_path)
    service.start_early()
    assert not list(tmp_path.iterdir())  # nothing starts while others may use the GPU

    async def serving(engine: SGLangEngine) -> tuple[int, list[int]]:
        port = engine._urls[0].rpartition(":")[2]
        [watchdog] = [child for child in psutil.Process().children() if port in child.cmdline()]
        return watchdog.pid, await sample(engine)

    try:
        group, first = service.run(model, serving)
        service.end_stage()
        service.end_stage()  # a stage that asked no server
        again, second = service.run(other_model, serving)
        service.end_stage()
        assert again == group and first != second
        os.killpg(group, signal.SIGKILL)
        new, third = service.run(model, serving)
        assert new != group and third == first
    finally:
        service.close()
    assert not group_exists(new)
