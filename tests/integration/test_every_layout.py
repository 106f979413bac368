"""A made file of every published layout in one run, for real: imported, checked, sampled, verified and weighed."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.made_rows import ROWS

from megavar.data.questions import read_questions
from megavar.record_files import read_records
from megavar.records import Answer, Trace, Weight

pytestmark = [pytest.mark.sglang, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
NUM_TRACES, NUM_ANSWERS = 2, 2
CONFIG = """
name: layouts
runs_dir: {folder}
model: {root}/examples/base/qwen3-tiny
data: {{train: {folder}/train.jsonl, max_sequence_tokens: 1400}}
precision: {{recipe: fp32}}
rollout: {{python: {root}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 16384, concurrency: 16}}
sft: &train {{epochs: 30, batch_sequences: 5, microbatch_tokens: 2048, learning_rate: 3.0e-3}}
posterior: {{train: *train}}
sample: {{num_traces: {traces}, num_answers: {answers}, max_trace_tokens: 40, max_answer_tokens: 60}}
score: {{microbatch_tokens: 4096}}
objective: {{on_no_correct_trace: geometric_mean}}
policy: {{train: {{<<: *train, epochs: 1}}}}
logging: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for name, row in ROWS.items():  # questions that two layouts share would be duplicates of one another
        text = re.sub(r"Add three|Which one|Double a", rf"\g<0> ({name})", json.dumps(row))
        (folder / f"{name}.json").write_text(text)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, root=ROOT, traces=NUM_TRACES, answers=NUM_ANSWERS))
    files = [str(folder / f"{name}.json") for name in ROWS]
    for command in (
        ["-m", "megavar", "import", *files, "--out", str(folder / "train.jsonl")],
        ["-m", "megavar", "check", "--config", str(folder / "run.yaml")],
        ["examples/pretrain_variational.py", "--config", str(folder / "run.yaml")],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "layouts"


def test_every_layouts_question_is_sampled_judged_and_weighed(run):
    questions = {question.id: question for question in read_questions(run.parent / "train.jsonl")}
    assert len(questions) == len(ROWS)
    traces = read_records(run / "round_01" / "traces" / "data.parquet", Trace)
    closed, verdicts = defaultdict(list), defaultdict(list)
    for trace in traces:
        closed[trace.question_id] += [trace.trace_index] if trace.finish == "closed" else []
    assert closed.keys() == questions.keys()
    assert sum(map(len, closed.values())) > NUM_TRACES * len(questions) / 2
    for answer in read_records(run / "round_01" / "verified" / "data.parquet", Answer):
        verdicts[answer.question_id, answer.trace_index].append(answer.verdict)
    assert verdicts.keys() == {(id, index) for id, some in closed.items() for index in some}
    for found in verdicts.values():
        assert len(found) == NUM_ANSWERS and {*found} <= {"correct", "wrong", "no_answer"}
    weights = defaultdict(float)
    for weight in read_records(run / "round_01" / "weights" / "data.parquet", Weight):
        weights[weight.question_id] += weight.weight
    assert weights == pytest.approx({id: float(bool(some)) for id, some in closed.items()}, rel=1e-9)
