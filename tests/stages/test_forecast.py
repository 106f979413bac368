"""What `megavar check` says that a run will take, against transformers' count and the run's own arithmetic."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megavar.cli import main
from megavar.config.load import load_config
from megavar.models.memory import LOGITS_AT_ONCE
from megavar.stages.check import check_run
from megavar.training.logprobs import CHUNK_ELEMENTS

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
NUM_QUESTIONS = 40


@pytest.fixture
def config_file(tmp_path):
    rows = [
        {
            "id": f"q{n}",
            "question": f"{n}+3",
            "answer": "0",
            "trace": "7+3\n" * (1 + n % 3),
            "verifier": "none" if n else "math",
        }
        for n in range(NUM_QUESTIONS)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(
        f"name: a\nruns_dir: {tmp_path}/runs\nmodel: {BASE}\n"
        f"data: {{train: {tmp_path}/t.jsonl, max_sequence_tokens: 160, questions_per_round: 10}}\n"
        "precision: {recipe: fp32}\nsft: {epochs: 2, batch_sequences: 16}\npolicy: {train: {num_steps: 7}}\n"
        "sample: {num_traces: 3, num_answers: 2, max_trace_tokens: 80, max_answer_tokens: 16}\n"
        "rollout: {mode: external, urls: [http://127.0.0.1:9]}\n"
    )
    return tmp_path / "run.yaml"


def rows_of(config_file, *overrides, ranks=1, rate=None):
    return dict(check_run(load_config(config_file, list(overrides)), ranks).rows(rate))


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def test_questions_and_their_tokens_are_counted(config_file):
    rows = rows_of(config_file)
    assert rows["questions"] == "40 (39 none, 1 math), 40 with a gold trace"
    assert rows["sampled"] == "10 questions in 1 round"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lengths = sorted(len(tokenizer("7+3\n" * (1 + n % 3) + "</think>")["input_ids"]) for n in range(NUM_QUESTIONS))
    assert numbers(rows["tokens of a gold trace"])[::2] == [lengths[20], lengths[36], lengths[39], lengths[39]][:4]


def test_steps_are_those_of_the_stages(config_file):
    rows = rows_of(config_file)
    assert rows["stage sft"].startswith("5 steps of 16 sequences")
    assert rows["stage policy"].startswith("at most 7 steps of 32 sequences")
    assert rows["stage sample"].startswith("30 traces and 60 answers") and rows["stage sample"].endswith("3,360")
    assert rows_of(config_file, "rounds=2")["stage policy"].startswith("at most 14 steps")


def test_a_posterior_that_is_the_policy_is_sampled_and_scored_and_not_trained(config_file):
    trained, prompted = rows_of(config_file), rows_of(config_file, "posterior.source=prompt")
    assert trained.keys() - prompted.keys() == {"stage posterior"}
    for name in ("tokens of a prompt with hint", "stage sample", "stage score"):
        assert prompted[name] == trained[name]
    models = [check_run(load_config(config_file, [f"posterior.source={source}"]), 1) for source in ("gold", "prompt")]
    assert models[0]._disk() > models[1]._disk()
    budget = "posterior.train.microbatch_tokens=100000"  # of a training that is not done
    largest = [
        check_run(load_config(config_file, [f"posterior.source={source}", budget]), 1) for source in ("gold", "prompt")
    ]
    assert largest[0]._memory() != largest[1]._memory() == models[1]._memory()


def test_time_is_tokens_by_rate(config_file):
    total = sum(
        numbers(text)[2] for name, text in rows_of(config_file).items() if name in ("stage sft", "stage policy")
    )
    assert total > 0
    hours = [numbers(rows_of(config_file, rate=rate)["time"])[0] for rate in (0.1, 0.05)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=1e-2)


def test_memory_is_that_of_the_parameters_on_a_rank(config_file):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    count = sum(parameter.numel() for parameter in model.parameters())
    forecast = check_run(load_config(config_file, []), 1)
    assert forecast._num_parameters == count
    listed = dict(re.findall(r"(\w+) ([\d.]+)", forecast._memory().partition("(")[2]))
    assert float(listed["weights"]) == pytest.approx(4e-9 * count, abs=0.005)
    # Logits of all 8,192 tokens over 512 rows, and the gradient of the table, in float32.
    assert LOGITS_AT_ONCE == CHUNK_ELEMENTS and float(listed["logits"]) == round(4e-9 * 512 * (8192 + 128), 2)
    assert float(listed["activations"]) > 0
    split = check_run(load_config(config_file, ["parallel.tensor=2"]), 4)
    assert split._ranks == 4 and "on 4 ranks" in split._memory()


def test_the_command_prints_the_rows_and_writes_nothing(config_file, capsys):
    before = sorted(config_file.parent.iterdir())
    assert main(["check", "--config", str(config_file), "--ranks", "2", "--tokens-per-second", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "40 with a gold trace" in printed and "at 1,000 tokens/s" in printed and "on 2 ranks" in printed
    assert sorted(config_file.parent.iterdir()) == before
    assert main(["check", "--config", str(config_file), "--tokens-per-second", "0"]) == 2
    assert "--tokens-per-second=0.0 is not a rate" in capsys.readouterr().out
