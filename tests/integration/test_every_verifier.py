"""Questions of every verifier in one run, for real: checked, sampled, judged, weighed and trained on."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from megavar.record_files import read_records
from megavar.records import Answer, Trace, Weight
from megavar.verifiers import VERIFIERS

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).parents[2]
PROGRAM = "\n```python\nprint(int(input())*2)\n```"
QUESTIONS = [
    {"id": "math", "question": "1+1", "answer": "2"},
    {"id": "choice", "question": "Even?\nA. 1\nB. 2", "answer": "B", "verifier": "choice"},
    {"id": "text", "question": "Sky?", "answer": "grey | gray", "verifier": "text"},
    {"id": "countdown", "question": "Make 6 of 1 2 3", "answer": '{"target": 6, "nums": [1, 2, 3]}',
     "solution": "\n\\boxed{1+2+3}", "verifier": "countdown"},
    {"id": "code", "question": "Double it", "answer": '{"inputs": ["3"], "outputs": ["6"]}', "solution": PROGRAM,
     "verifier": "code"},
    {"id": "none", "question": "Say hi", "answer": "hi", "solution": "\nhi", "verifier": "none"},
]  # fmt: skip
NUM_TRACES, NUM_ANSWERS = 3, 2
CONFIG = """
name: every
runs_dir: {folder}
model: {root}/examples/base/qwen3-tiny
data: {{train: {folder}/train.jsonl, eval: {folder}/train.jsonl, max_sequence_tokens: 200}}
precision: {{recipe: fp32}}
rollout: {{python: {root}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 4096, context_length: 256,
           concurrency: 8}}
sft: &train {{epochs: 120, batch_sequences: 6, microbatch_tokens: 1024, learning_rate: 3.0e-3, save_interval: 60}}
posterior: {{train: {{<<: *train, epochs: 40}}}}
sample: {{num_traces: {traces}, num_answers: {answers}, max_trace_tokens: 40, max_answer_tokens: 60, temperature: 0.5}}
score: {{temperature: 0.5, microbatch_tokens: 1024}}
policy: {{train: {{<<: *train, epochs: 2}}}}
eval: {{num_samples: 2}}
logging: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    rows = [{**question, "trace": f"{question['id']};"} for question in QUESTIONS]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CONFIG.format(folder=folder, root=ROOT, traces=NUM_TRACES, answers=NUM_ANSWERS)
    (folder / "run.yaml").write_text(config)
    check = [sys.executable, "-m", "megavar", "check", "--config", str(folder / "run.yaml")]
    checked = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0 and "1 countdown" in checked.stdout, checked.stdout + checked.stderr
    assert not (folder / "every").exists()
    command = [sys.executable, "examples/pretrain_variational.py", "--config", str(folder / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "every"


def test_every_judged_question_has_verdicts_and_correct_answers(run):
    assert {question.get("verifier", "math") for question in QUESTIONS} == {*VERIFIERS, "none"}
    verdicts = defaultdict(list)
    for answer in read_records(run / "round_01" / "verified" / "data.parquet", Answer):
        verdicts[answer.question_id].append(answer.verdict)
    assert verdicts.keys() == {*VERIFIERS}  # a question without a verifier gets no answers
    for name, found in verdicts.items():
        assert "correct" in found, (name, found)
        assert {*found} <= {"correct", "wrong", "no_answer"}, (name, found)


def test_every_question_has_weights(run):
    traces = read_records(run / "round_01" / "traces" / "data.parquet", Trace)
    closed = {(trace.question_id, trace.trace_index) for trace in traces if trace.finish == "closed"}
    total = defaultdict(float)
    for weight in read_records(run / "round_01" / "weights" / "data.parquet", Weight):
        total[weight.question_id] += weight.weight
        expected = "unverifiable" if weight.question_id == "none" else "ok"
        if (weight.question_id, weight.trace_index) in closed:
            assert weight.status == expected
            assert weight.weight > 0 or weight.question_id != "none"
    assert total == pytest.approx({question["id"]: 1.0 for question in QUESTIONS}, rel=1e-9)


def test_the_held_out_questions_without_a_verifier_are_not_counted(run):
    answers = read_records(run / "eval" / "pi_1" / "verified" / "data.parquet", Answer)
    assert {answer.question_id for answer in answers} == {*VERIFIERS}


def test_exports_end_with_the_trained_token_and_without_the_bases_sampling(run):
    base = json.loads((ROOT / "examples" / "base" / "qwen3-tiny" / "generation_config.json").read_text())
    assert base["do_sample"] and base["temperature"] == 0.7
    for model in (run / "sft" / "hf", run / "round_01" / "posterior" / "hf", run / "hf"):
        generation = json.loads((model / "generation_config.json").read_text())
        assert generation.keys() == {"eos_token_id", "pad_token_id", "transformers_version"}
        assert generation["eos_token_id"] == json.loads((model / "config.json").read_text())["eos_token_id"] == 337
