"""A stage that fails while servers live is reported once, by its line, and nothing outlives the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
OBJECTIVE = """
from pathlib import Path
from megavar.objectives import iwae
from megavar.records import Verdict

def weigh(scores, truncated, config):
    if Path(__file__).with_name("broken").exists():
        raise ValueError("this objective is broken; mend it.")
    return iwae.weigh(scores, truncated, config)
"""


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """The main job on two ranks that it forks, with a managed server; all that it prints is in one stream."""
    drop = ("WORLD_SIZE", "RANK", "PYTHONWARNINGS", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in drop}
    return subprocess.run(
        [sys.executable, "examples/pretrain_variational.py", "--config", f"{folder}/run.yaml", "--tp", "2"],
        cwd=ROOT, env={**clean, "PYTHONPATH": str(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def processes_of(folder: Path) -> list[psutil.Process]:
    """Whatever runs with the folder in its command: ranks, servers and what watches them."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    ]


@pytest.mark.sglang
def test_a_mistake_in_a_stage_is_the_last_line_and_the_rerun_finishes_on_managed_servers(tmp_path):
    (tmp_path / "outside.py").write_text(OBJECTIVE)
    (tmp_path / "broken").touch()
    rows = [{"id": f"q{n}", "question": f"{n}+1", "answer": str(n + 1), "trace": f"{n}+1={n + 1};"} for n in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(f"""
name: a
runs_dir: {tmp_path}/runs
model: {ROOT}/examples/base/qwen3-tiny
data: {{train: {tmp_path}/t.jsonl, eval: {tmp_path}/t.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
rollout: {{python: {ROOT}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 8192, context_length: 256}}
sft: &train {{num_steps: 40, batch_sequences: 8, learning_rate: 2.0e-3}}
posterior: {{train: *train}}
policy: {{train: {{<<: *train, num_steps: 2}}}}
sample: {{num_traces: 2, num_answers: 1, max_trace_tokens: 64, max_answer_tokens: 16}}
objective: {{name: "outside:weigh", ratio: sequence}}
score: {{temperature: 0.7}}
""")
    broken = start(tmp_path)
    lines = broken.stdout.splitlines()
    assert lines[-1] == "error: this objective is broken; mend it.", broken.stdout
    assert broken.returncode == 2 and broken.stdout.count("error:") == 1 and "Traceback" not in broken.stdout
    assert processes_of(tmp_path) == []

    (tmp_path / "broken").unlink()
    mended = start(tmp_path)
    manifest = json.loads((tmp_path / "runs" / "a" / "manifest.json").read_text())
    assert mended.returncode == 0, mended.stdout
    assert all(entry["status"] == "finished" for entry in manifest.values()) and "eval" in manifest
    assert mended.stdout.count("finished, skipped") >= 5 and processes_of(tmp_path) == []
