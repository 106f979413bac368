"""`megavar selftest` on a grid of four ranks with a real server, and what it says of numbers that differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megavar.ranks import ExplainedFailure
from megavar.stages.selftest import Comparison, _of_gradients, _of_logps, _report
from megavar.training.one_step import Gradients

ROOT = Path(__file__).parents[2]
CONFIG = """
name: own
runs_dir: {folder}
model: {root}/examples/base/qwen3-tiny
data: {{train: {folder}/questions.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2, pipeline: 2}}
rollout: {{python: {root}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 4096, context_length: 256}}
sample: {{max_trace_tokens: 40, max_answer_tokens: 16}}
score: {{temperature: 0.7, microbatch_tokens: 1024}}
policy: {{train: {{microbatch_tokens: 1024}}}}
"""


def questions(count: int) -> str:
    rows = [
        {
            "id": f"q{n}",
            "question": f"{n}+{n}",
            "answer": str(2 * n),
            **({"trace": "7+3\n" * (1 + n % 5)} if n % 2 else {}),
        }
        for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
@pytest.mark.sglang
def test_on_a_sound_grid_every_way_gives_the_same(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path, root=ROOT))
    (tmp_path / "questions.jsonl").write_text(questions(50))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
         "-m", "megavar", "selftest", "--config", str(tmp_path / "run.yaml")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = json.loads((tmp_path / "own" / "selftest" / "result.json").read_text())
    assert [row["verdict"] for row in rows] == ["same"] * 6
    # In float32 all ways but the server's agree to rounding, and the tokens of 32 sequences were compared.
    assert max(row["difference"] for row in rows[:-1]) < 1e-5
    assert rows[-1]["difference"] < 1e-3
    assert all(word in done.stdout for word in ("transformers", "exported", "server"))
    assert sorted(path.name for path in (tmp_path / "own" / "selftest").iterdir()) == ["result.json", "servers"]


def logps(*values: float) -> list[np.ndarray]:
    return [np.array(values, np.float32)]


@pytest.mark.parametrize(("other", "verdict"), [(-1.02, "same"), (-1.2, "DIFFERS"), (float("nan"), "DIFFERS")])
def test_the_mean_over_tokens_is_what_counts(other, verdict):
    compared = _of_logps("a way", logps(-1, -2), logps(other, -2), allowed=0.03)
    assert compared.verdict == verdict and compared.note.startswith("2 tokens")


def test_gradients_are_compared_relative_to_their_size():
    loss, norm = _of_gradients([Gradients(100.0, 1e-3), Gradients(101.0, 1.2e-3)], allowed=0.03)
    assert loss.difference == pytest.approx(0.01) and loss.verdict == "same"
    assert norm.difference == pytest.approx(0.2) and norm.verdict == "DIFFERS"


def test_what_differs_is_an_error_that_names_it_and_what_does_not_fit_is_said(tmp_path, capsys):
    for name in ("checkpoints", "hf"):
        (tmp_path / name).mkdir()
    missing = _of_logps("by transformers", logps(-1), None, 0.03)
    with pytest.raises(ExplainedFailure, match=r"1 of 2 comparisons .* first 'a way'"):
        _report([missing, Comparison("a way", 0.2, 0.03, "")], tmp_path)
    printed = capsys.readouterr().out
    assert "not compared" in printed and "DIFFERS" in printed
    assert [row["verdict"] for row in json.loads((tmp_path / "result.json").read_text())] == ["not compared", "DIFFERS"]
