"""The paper's run, as its file has it, on a hundred made rows of its data set: a toy in size, with real servers."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_rows import stratos
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megavar.config.load import load_config
from megavar.data.questions import read_questions
from megavar.record_files import read_records
from megavar.records import Answer, Score, Trace, Weight

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAPER = ROOT / "conf" / "paper_qwen3_4b.yaml"
SIZES = [
    "data.max_sequence_tokens=320", "sample.max_trace_tokens=40", "sample.max_answer_tokens=40",
    *(f"{job}.{setting}" for job in ("sft", "posterior.train", "policy.train")
      for setting in ("epochs=12", "batch_sequences=10", "microbatch_tokens=4096", "learning_rate=5e-3",
                      "recompute=none")),
    "policy.train.epochs=1", "score.microbatch_tokens=4096", "precision.recipe=fp32", "rollout.dtype=float32",
    "rollout.num_servers=1", "rollout.mem_fraction=null", "rollout.max_total_tokens=16384", "rollout.concurrency=64",
    f"rollout.python={ROOT}/.venv-sglang/bin/python",
]  # fmt: skip
"""Overrides of model, files and sizes alone."""


def made_row(number):
    """A sum; every tenth is a program, whose solution has no box."""
    left, right = divmod(number, 10)
    if right == 9:
        return stratos(f"Print {left} stars.", f"{left} stars.", f"```python\nprint('*' * {left})\n```")
    asked = f"Return your final response within \\boxed{{}}. Add {left} and {right}."
    return stratos(asked, f"{left}+{right}={left + right}.", f"It is $\\boxed{{{left + right}}}$.")


def write_model(folder, texts):
    """A random Qwen3 of two narrow layers, whose tokenizer has few tokens for what the texts repeat."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700, min_frequency=60, max_token_length=24, initial_alphabet=alphabet, special_tokens=special
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special
    )
    fast.chat_template = (ROOT / "examples" / "base" / "qwen3-tiny" / "chat_template.jinja").read_text()
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=704, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, eos_token_id=2, pad_token_id=0,
        initializer_range=0.05, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    rows = [made_row(number) for number in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [turn["value"] for row in rows for turn in row["conversations"]]
    write_model(folder / "base", said + 100 * [load_config(PAPER, []).templates.system])
    settings = [
        f"runs_dir={folder}", f"model={folder}/base", f"data.train={folder}/train.jsonl", "data.eval=null", *SIZES
    ]  # fmt: skip
    for command in (
        ["-m", "megavar", "import", str(folder / "rows.jsonl"), "--out", str(folder / "train.jsonl"),
         "--max-trace-tokens", "27999", "--model", str(folder / "base")],
        ["examples/pretrain_variational.py", "--config", str(PAPER), *settings],
    ):  # fmt: skip
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "paper_qwen3_4b"


def records(run, name, kind):
    return list(read_records(run / "round_01" / name / "data.parquet", kind))


@pytest.fixture(scope="module")
def questions(run):
    """Question id -> question."""
    return {question.id: question for question in read_questions(run.parent / "train.jsonl")}


def test_the_import_takes_markers_and_boilerplate_out(questions):
    assert len(questions) == 100 and Counter(row.verifier for row in questions.values()) == {"math": 90, "none": 10}
    assert {row.question for row in questions.values() if row.verifier == "math"} == {
        f"Add {left} and {right}." for left in range(10) for right in range(9)
    }
    assert not any("<|" in row.trace + row.solution for row in questions.values())


def test_traces_and_answers_are_in_the_form_of_the_data(run, questions):
    decode = AutoTokenizer.from_pretrained(run / "hf").decode
    traces, answers = records(run, "traces", Trace), records(run, "verified", Answer)
    assert Counter(trace.question_id for trace in traces) == dict.fromkeys(questions, 8)
    closed = [trace for trace in traces if trace.finish == "closed"]
    assert len(closed) > len(traces) / 2
    for trace in closed:
        assert decode(trace.prompt_ids).endswith("<|im_start|>assistant\n<|begin_of_thought|>\n\n")
        assert decode(trace.trace_ids).endswith("\n\n<|end_of_thought|>")
    judged = {
        (trace.question_id, trace.trace_index) for trace in closed if questions[trace.question_id].verifier != "none"
    }
    assert Counter((answer.question_id, answer.trace_index) for answer in answers) == dict.fromkeys(judged, 8)
    correct = [answer.text for answer in answers if answer.correct]
    in_form = [
        re.fullmatch(r"\n\n<\|begin_of_solution\|>.*\\boxed.*<\|end_of_solution\|>", text, re.DOTALL)
        for text in correct
    ]
    assert len(correct) > 100 and sum(map(bool, in_form)) > 0.9 * len(correct)


def test_the_best_trace_is_chosen_by_accuracy_or_by_likelihood_where_nothing_verifies(run, questions):
    scores, chosen = defaultdict(dict), defaultdict(dict)
    closed = {(row.question_id, row.trace_index) for row in records(run, "traces", Trace) if row.finish == "closed"}
    for score in records(run, "scores", Score):
        ratio = np.mean(score.logp_policy.astype(float) - score.logp_posterior.astype(float))
        if questions[score.question_id].verifier == "none":
            weight = np.exp(ratio + score.logp_answer.astype(float).mean())
        else:
            weight = (score.num_correct or 0) / 8 * np.exp(ratio)
        if (score.question_id, score.trace_index) in closed and weight > 0:
            scores[score.question_id][score.trace_index] = weight
    for weight in records(run, "weights", Weight):
        if weight.weight > 0:
            chosen[weight.question_id][weight.trace_index] = weight.weight
    for id in questions:
        expected = max(scores[id].values(), default=None)
        ((index, weight),) = chosen[id].items()
        assert weight == 1.0
        assert index == -1 if expected is None else scores[id][index] == pytest.approx(expected, rel=1e-12)


def test_the_policy_learns_from_as_many_gold_traces_as_sampled_ones(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == "policy"]
    assert steps == list(range(1, 2 * 100 // 10 + 1))  # an epoch, ten sequences a step
    assert (run / "hf" / "model.safetensors").exists()
