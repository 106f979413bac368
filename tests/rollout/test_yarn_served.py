"""A model whose RoPE is scaled by YaRN, served beyond its original length: its log-probs are those of transformers."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_serving import CONFIG, client, write_model
from transformers import AutoModelForCausalLM

from megavar.rollout import sglang_servers
from megavar.rollout.engine import GenerateRequest, Generation, RequestRejected
from megavar.rollout.sglang_servers import ManagedServers

ORIGINAL = 64
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.3,
    "attn_factor": 1.3 / 1.1386294361119891,
}  # fmt: skip
PROMPT = np.random.default_rng(0).integers(10, 400, 150).tolist()
REQUEST = GenerateRequest(PROMPT, max_tokens=60, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def yarn_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen's documentation has it: the scaling is added, max_position_embeddings stays."""
    folder = tmp_path_factory.mktemp("models") / "yarn"
    sizes = {"max_position_embeddings": ORIGINAL, "rope_theta": 1e4}
    return write_model(folder, seed=2, rope_scaling=dict(YARN), **sizes)


def logps_by_transformers(model: Path, ids: np.ndarray, **changes: object) -> np.ndarray:
    """Of `ids` after PROMPT, [tokens]; with these changes of the scaling."""
    config = json.loads((model / "config.json").read_text())
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    changed = {where: {**config[where], **changes}}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **changed).eval()
    with torch.no_grad():
        logits = network(torch.tensor([[*PROMPT, *ids.tolist()]])).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0].numpy()


@pytest.mark.sglang
def test_logps_far_beyond_the_original_length_equal_those_of_transformers(
    runner: asyncio.Runner, yarn_model: Path, tmp_path: Path
) -> None:
    async def sample() -> list[Generation]:
        async with (
            ManagedServers(CONFIG, yarn_model, tmp_path) as servers,
            client(*servers.urls, api_key=servers.api_key) as engine,
        ):
            await engine.check_model(yarn_model)
            generations = await engine.generate(replace(REQUEST, num_samples=4))
            with pytest.raises(RequestRejected, match="context length"):
                await engine.generate(replace(REQUEST, max_tokens=4 * ORIGINAL - len(PROMPT) + 1))
            return generations

    generations = runner.run(sample())
    assert max(len(generation.ids) for generation in generations) > 40
    for generation in generations:
        assert np.abs(generation.logps - logps_by_transformers(yarn_model, generation.ids)).max() < 1e-4
    # Tight enough to tell the scaling from a slightly different one.
    for change in ({"factor": 3.9}, {"attention_factor": 1.29}):
        others = [logps_by_transformers(yarn_model, generation.ids, **change) for generation in generations]
        pairs = zip(generations, others, strict=True)
        assert max(np.abs(generation.logps - other).max() for generation, other in pairs) > 1e-3


def test_servers_are_told_the_extended_length_unless_the_configuration_says_another(
    yarn_model: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"

    def started(folder: Path, context_length: int | None) -> tuple[str | None, str | None]:
        """What SGLang would be told, and whether it may go beyond max_position_embeddings."""
        server = sglang_servers.Server(
            0, replace(CONFIG, context_length=context_length), folder, tmp_path, gpus=[], api_key="key"
        )
        seen = {}
        monkeypatch.setattr(
            sglang_servers.subprocess, "Popen", lambda command, **others: seen.update(others, command=command)
        )
        server._launch()
        command = seen["command"]
        given = command[command.index("--context-length") + 1] if "--context-length" in command else None
        return given, seen["env"].get(allowed)

    assert allowed not in os.environ
    assert started(yarn_model, None) == ("256", "1")
    assert started(yarn_model, 200) == ("200", "1")
    assert started(yarn_model, 300) == ("300", None)  # which SGLang refuses
    assert started(model, None) == (None, None)
    assert started(model, 600) == ("600", None)
