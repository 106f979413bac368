"""Servers live over the stages of a run on CPUs, and serve what each stage asks for."""

import os
from pathlib import Path

from helpers.tiny_serving import CONFIG

from megavar.rollout.engine import GenerateRequest
from megavar.rollout.service import RolloutService
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_servers import group_exists

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
