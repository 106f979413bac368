"""The engine contract, on the real server: tokens, log-probs, stops, seeds and weights are what they are said to be."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_serving import client
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megavar.rollout.engine import GenerateRequest, Generation, RequestRejected

pytestmark = pytest.mark.sglang
PROMPT = [40, 41, 42, 60, 61]
GREEDY = GenerateRequest(PROMPT, max_tokens=16, temperature=0.0)
SAMPLED = GenerateRequest(PROMPT, max_tokens=16, temperature=0.7, seed=11)


def generate(runner: asyncio.Runner, url: str, model: Path, *requests: GenerateRequest) -> list[list[Generation]]:
    async def run() -> list[list[Generation]]:
        async with client(url) as engine:
            await engine.check_model(model)
            return list(await asyncio.gather(*(engine.generate(request) for request in requests)))

    return runner.run(run())


def load(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def reference_logps(model: Path, ids: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probs [tokens] of ids after PROMPT, by transformers."""
    with torch.no_grad():
        logits = load(model)(torch.tensor([[*PROMPT, *ids.tolist()]])).logits[0, len(PROMPT) - 1 : -1]
    logps = torch.log_softmax(logits / temperature, dim=-1)
    return logps.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0].numpy()


def greedy_ids(model: Path) -> list[int]:
    """The 16 greedy tokens after PROMPT, by transformers, in one forward a token."""
    reference, ids = load(model), list(PROMPT)
    eos = reference.config.eos_token_id
    with torch.no_grad():
        while len(ids) < len(PROMPT) + 16 and ids[-1] != eos:
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_greedy_ids_equal_those_of_transformers(runner: asyncio.Runner, server: str, model: Path) -> None:
    [[generation]] = generate(runner, server, model, GREEDY)
    assert generation.ids.tolist() == greedy_ids(model)
    assert generation.ids.dtype == np.int32


def test_logps_are_of_the_logits_over_the_temperature(runner: asyncio.Runner, server: str, model: Path) -> None:
    [[cold], [plain], [greedy]] = generate(runner, server, model, SAMPLED, replace(SAMPLED, temperature=1.0), GREEDY)
    for generation, temperature in ((cold, 0.7), (plain, 1.0), (greedy, 1.0)):
        expected = reference_logps(model, generation.ids, temperature)
        assert np.abs(generation.logps - expected).max() < 1e-4
    # Tight enough to tell one temperature from the other.
    assert np.abs(cold.logps - reference_logps(model, cold.ids, 1.0)).max() > 1e-2


def test_a_length_cut_is_reported(runner: asyncio.Runner, server: str, model: Path) -> None:
    [[generation]] = generate(runner, server, model, replace(GREEDY, max_tokens=3))
    assert (len(generation.ids), generation.finish) == (3, "length")


def test_the_stop_token_belongs_to_the_sample(runner: asyncio.Runner, server: str, model: Path) -> None:
    greedy = greedy_ids(model)
    stop = greedy[5]
    [[generation]] = generate(runner, server, model, replace(GREEDY, stop_token_ids=(stop,)))
    assert generation.ids.tolist() == greedy[: greedy.index(stop) + 1]
    assert generation.finish == "stop"
    assert len(generation.logps) == len(generation.ids)
    assert generation.text == AutoTokenizer.from_pretrained(model).decode(generation.ids)


def test_the_end_of_sequence_belongs_to_the_sample(runner: asyncio.Runner, server: str, model: Path) -> None:
    eos = load(model).config.eos_token_id
    # One in 512 tokens at this temperature: some of 64 samples of up to 400 tokens end by it.
    request = replace(SAMPLED, temperature=3.0, max_tokens=400, num_samples=16)
    [generations] = generate(runner, server, model, request)
    ended = [generation for generation in generations if generation.finish == "stop"]
    assert ended
    for generation in ended:
        assert generation.ids[-1] == eos and eos not in generation.ids[:-1]


def test_a_stop_string_keeps_the_tokens_that_hold_it(runner: asyncio.Runner, server: str, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    greedy = greedy_ids(model)
    # Two printable neighbours make a string that spans a token boundary.
    first = next(
        index
        for index in range(2, 15)
        if "\ufffd" not in tokenizer.decode(greedy[:index] + greedy[index : index + 2])[-4:]
        and tokenizer.decode(greedy[index]).isprintable()
        and tokenizer.decode(greedy[index + 1]).isprintable()
    )
    stop = tokenizer.decode(greedy[first : first + 2])
    text = tokenizer.decode(greedy)
    length = next(n for n in range(1, 17) if stop in tokenizer.decode(greedy[:n]))
    [[generation]] = generate(runner, server, model, replace(GREEDY, stop=(stop,)))
    assert generation.finish == "stop"
    assert generation.ids.tolist() == greedy[:length]
    assert generation.text == text[: text.index(stop) + len(stop)]


def test_samples_of_a_request_differ_and_carry_their_seeds(runner: asyncio.Runner, server: str, model: Path) -> None:
    [generations] = generate(runner, server, model, replace(SAMPLED, num_samples=8))
    assert len({tuple(generation.ids) for generation in generations}) == 8
    assert generations[0].seed == SAMPLED.seed
    assert len({generation.seed for generation in generations}) == 8
    for generation in generations:  # all after the same prompt
        assert np.abs(generation.logps - reference_logps(model, generation.ids, 0.7)).max() < 1e-4


def test_a_token_outside_the_vocabulary_is_refused_before_it_kills_the_server(
    runner: asyncio.Runner, server: str, model: Path
) -> None:
    with pytest.raises(RequestRejected, match="token 512, outside of the served vocabulary of 512"):
        generate(runner, server, model, replace(GREEDY, prompt_ids=[1, 512]))


def test_a_rejected_request_shows_the_message_of_the_server(runner: asyncio.Runner, server: str, model: Path) -> None:
    with pytest.raises(RequestRejected, match=r"HTTP 400.*context length"):
        generate(runner, server, model, replace(GREEDY, max_tokens=10_000))


def test_one_warning_says_that_seeds_are_not_replayable(
    runner: asyncio.Runner, server: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        generate(runner, server, model, GREEDY, GREEDY)
    assert sum("NOT replayable" in record.message for record in caplog.records) == 1


def test_deterministic_is_refused_by_a_server_without_it(runner: asyncio.Runner, server: str, model: Path) -> None:
    async def run() -> None:
        async with client(server, deterministic=True) as engine:
            await engine.check_model(model)

    with pytest.raises(ValueError, match="enable-deterministic-inference"):
        runner.run(run())


def test_loaded_weights_are_the_ones_sampled_from(
    runner: asyncio.Runner, server: str, model: Path, other_model: Path
) -> None:
    async def run() -> list[list[int]]:
        async with client(server) as engine:
            await engine.check_model(model)
            outputs = [await engine.generate(GREEDY)]
            for weights in (other_model, model):
                await engine.load_weights(weights)
                outputs.append(await engine.generate(GREEDY))
            return [generations[0].ids.tolist() for generations in outputs]

    before, other, back = runner.run(run())
    assert before == back == greedy_ids(model)
    assert other == greedy_ids(other_model) != before
