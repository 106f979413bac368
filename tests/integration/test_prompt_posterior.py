"""posterior.source=prompt for real: two rounds on a real server, in which q is the round's own policy with the hint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megavar.cli import main
from megavar.data.questions import read_questions
from megavar.record_files import read_records
from megavar.records import Score, Trace, Weight
from megavar.runs.metrics import Metrics

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).parents[2]
NUM_QUESTIONS, NUM_TRACES, LIMIT = 12, 3, 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt")
    train = "epochs: 10, batch_sequences: 8, microbatch_tokens: 1024, learning_rate: 2.0e-3"
    (folder / "run.yaml").write_text(f"""
name: job
runs_dir: {folder}
model: {ROOT}/examples/base/qwen3-tiny
rounds: 2
data: {{train: {folder}/data/train.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
rollout: {{python: {ROOT}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 8192, context_length: 256,
           concurrency: 8}}
sft: {{{train}}}
posterior: {{source: prompt}}
sample: {{num_traces: {NUM_TRACES}, num_answers: 2, max_trace_tokens: 80, max_answer_tokens: 16, temperature: 0.7}}
score: {{temperature: 0.7, microbatch_tokens: 2048}}
objective: {{max_leakage: {LIMIT}, on_no_correct_trace: gold}}
policy: {{init: sft, train: {{{train}}}}}
""")
    for command in (
        ["examples/data/generate.py", "--out", folder / "data", "--num-train", str(NUM_QUESTIONS), "--num-eval", "1"],
        ["examples/pretrain_variational.py", "--config", folder / "run.yaml"],
        ["-m", "megavar", "report", folder / "job"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "job"


@pytest.fixture(params=[1, 2])
def of_round(request, run):
    """(folder, policy that the round starts with) of each round."""
    policy = run / ("sft" if request.param == 1 else "round_01/policy") / "hf"
    return run / f"round_{request.param:02d}", policy


def records(folder, name, kind):
    return {(row.question_id, row.trace_index): row for row in read_records(folder / name / "data.parquet", kind)}


def test_nothing_is_trained_for_q(run):
    entries = json.loads((run / "manifest.json").read_text())
    stages = ("sample", "verify", "score", "weigh", "policy", "export")
    assert list(entries) == ["sft", *stages, *(f"{stage}_02" for stage in stages)]
    assert all(entry["status"] == "finished" for entry in entries.values())
    assert not list(run.rglob("posterior")) and {row["stage"] for row in Metrics.read(run)} == {
        "sft", "weigh", "policy", "policy_02"
    }  # fmt: skip


def test_q_is_the_rounds_policy_under_the_hinted_prompt(run, of_round):
    """Scores under either prompt and the leakage in them, against transformers; and the server sampled from that q."""
    folder, policy = of_round
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    answer_of = {question.id: question.answer for question in read_questions(run.parent / "data" / "train.jsonl")}
    traces, scores = records(folder, "traces", Trace), records(folder, "scores", Score)
    assert len(traces) == len(scores) == NUM_QUESTIONS * NUM_TRACES
    closed = [trace for trace in traces.values() if trace.finish == "closed"]
    assert len(closed) > 10
    for trace in closed:
        score = scores[trace.question_id, trace.trace_index]
        prompt = tokenizer.decode(trace.prompt_ids)
        hint = prompt[prompt.index("\n\nHint:") : prompt.index("<|im_end|>")]
        assert hint == f"\n\nHint: the final answer is {answer_of[trace.question_id]}."
        for text, logps, leakage in (
            (prompt.replace(hint, ""), score.logp_policy, score.leakage),
            (prompt, score.logp_posterior, score.leakage_posterior),
        ):
            start = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([[*start, *trace.trace_ids.tolist()]])
            with torch.no_grad():
                expected = (model(tokens).logits[0] / 0.7).log_softmax(-1)
            rows = expected[len(start) - 1 : -1].gather(1, tokens[0, len(start) :, None]).squeeze(1).numpy()
            assert np.abs(rows - logps).max() < 2e-5
            if leakage is not None:
                said = slice(score.answer_start, score.answer_stop)
                assert tokenizer.decode(trace.trace_ids[said]) == answer_of[trace.question_id]
                assert leakage == pytest.approx(-rows[said].sum(), abs=2e-5)
        assert np.abs(trace.logp_engine - score.logp_posterior).max() < 1e-4
    assert any(score.leakage is not None for score in scores.values())


def test_leaky_traces_have_no_weight_and_everybody_says_so(run, of_round, capsys):
    folder, _ = of_round
    scores, weights = records(folder, "scores", Score), records(folder, "weights", Weight)
    for key, score in scores.items():
        leaky = score.leakage is not None and score.leakage > LIMIT
        assert (weights[key].status == "leaky") == leaky and not (leaky and weights[key].weight)
    (row,) = [row for row in Metrics.read(run) if row["stage"] == "weigh" and f"{row['step']:02d}" == folder.name[-2:]]
    said = [score.leakage for score in scores.values() if score.leakage is not None]
    assert row["leakage"] == pytest.approx(np.mean(said)) and 0 < row["answer_in_trace"] <= 1
    assert row["traces_leaky"] == sum(leakage > LIMIT for leakage in said) > 0
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["traces_leaky"] > 0 and summary["leakage"] > 0
    page = (run / "report" / "index.html").read_text()
    assert "<h2>Leakage</h2>" in page and f"above objective.max_leakage={LIMIT} nats were left out" in page
    assert main(["show", str(folder / "traces"), "--model", str(run / "hf"), "--limit", "100"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("⟦") == printed.count("leakage: ") == len(said)
