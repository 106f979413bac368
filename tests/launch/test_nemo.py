"""Executors of NeMo-Run that a file's functions return; tests/launch/test_slurm.py runs one on a real Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.nemo import EXECUTORS, NEMO_PYTHON, needs_nemo

from megavar.config.load import load_config
from megavar.runs.folder import Run
from megavar.runs.owner import owned

ROOT = Path(__file__).parents[2]
SEVERAL = """
import sys
from megavar.launch.command import main
for name, *more in [words.split() for words in sys.argv[1:]]:
    print(main(["--config", "run.yaml", "--executors", "executors.py", "--executor", name, *more]))
"""
"""Several launches in one process, each with its exit code: importing NeMo-Run takes seconds."""
REFUSED = {
    "none": "--executor none: executors.py has no such function; it has two_nodes, here, four_ranks, three_ranks, "
    "two_local_nodes, wrong_key, restarted, launched, by_ssh, text.",
    "wrong_key": "executors.py: wrong_key(): TypeError: SlurmExecutor.__init__() got an unexpected keyword argument "
    "'partitoin'",
    "text": "executors.py: text returned 'two_nodes', which is not an executor of NeMo-Run.",
    "restarted": "executors.py: restarted: retries=3 would start a job again after any exit code; leave it out, ",
    "launched": "executors.py: launched: launcher='torchrun': megavar starts the ranks; leave it out.",
    "by_ssh": "executors.py: by_ssh: its tunnel leads to another machine; submit on a login node, by a LocalTunnel.",
    "two_local_nodes": "executors.py: two_local_nodes: a LocalExecutor runs one node here, not 2; several nodes need",
    "three_ranks": "nodes=1 x 3 ranks = 3 ranks do not fit the parallel layout: tensor 2 x pipeline 1",
    "two_nodes --nodes 3": "nodes=3 x 1 ranks = 3 ranks do not fit the parallel layout: tensor 2 x pipeline 1",
    "four_ranks --nodes 2": "executors.py: four_ranks(nodes=2): TypeError: four_ranks() got an unexpected keyword",
    "here --max-requeues 3": "--max-requeues is for a Slurm job, not for a LocalExecutor; leave it out.",
    "two_nodes --max-requeues -1": "--max-requeues -1 is too small; the least is 0.",
}


@pytest.fixture
def folder(tmp_path):
    row = {"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    (tmp_path / "run.yaml").write_text(f"""
name: a
model: {ROOT}/examples/base/qwen3-tiny
data: {{train: t.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
sft: {{num_steps: 1}}
posterior: {{train: {{num_steps: 1}}}}
sample: {{max_trace_tokens: 80, max_answer_tokens: 16}}
rollout: {{mode: external, urls: [http://127.0.0.1:9]}}
logging: {{tensorboard: false}}
""")
    (tmp_path / "executors.py").write_text(EXECUTORS)
    return tmp_path


def run(folder: Path, python: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "NEMORUN_HOME"}
    return subprocess.run(
        [str(python), *words], cwd=folder, env={**clean, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launch(folder: Path, python: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, python, "-m", "megavar", "launch", *words)


@needs_nemo
@pytest.mark.slow
def test_a_mistake_is_one_line_and_nothing_is_started(folder):
    done = run(folder, NEMO_PYTHON, "-c", SEVERAL, *REFUSED)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(REFUSED), done.stdout
    for error, code, message in zip(lines[::2], lines[1::2], REFUSED.values(), strict=True):
        assert error.startswith(f"error: {message}") and code == "2"
    assert not (folder / "runs").exists()


def test_without_nemo_run_the_extra_is_named(folder):
    done = launch(folder, sys.executable, "--config", "run.yaml", "--executors", "executors.py", "--executor", "here")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stdout.startswith("error: NeMo-Run cannot be imported (No module named 'nemo_run'); install it with")


@needs_nemo
@pytest.mark.slow
def test_a_local_executor_runs_its_ranks_and_a_failure_or_mistake_is_not_reported_as_done(folder):
    """Two ranks train two models; then there is no server at the given URL. The next start finds a mistake."""
    arguments = ["--config", "run.yaml", "--executors", "executors.py", "--executor", "here"]
    failed = launch(folder, NEMO_PYTHON, *arguments)
    job = Path((folder / "runs/a/launch/job_id").read_text().strip())
    assert job.is_relative_to(folder / "runs/a/launch/nemo") and job.is_dir()
    assert "is an SGLang server running there?" in failed.stdout
    assert (failed.returncode, failed.stdout.splitlines()[-1]) == (1, f"job {job.name} FAILED, exit code 1")
    entries = json.loads((folder / "runs/a/manifest.json").read_text())
    assert entries["posterior"]["status"] == "finished" and entries["sample"]["status"] == "begun"
    status = launch(folder, NEMO_PYTHON, "status", "runs/a")
    assert (status.returncode, status.stdout) == (1, f"job {job.name} FAILED, exit code 1\n")
    cancel = launch(folder, NEMO_PYTHON, "cancel", "runs/a")
    assert (cancel.returncode, cancel.stdout.count("\n")) == (2, 1) and "nothing to cancel" in cancel.stdout

    with owned(Run(load_config(folder / "run.yaml", [f"runs_dir={folder}/runs"])).folder):
        second = launch(folder, NEMO_PYTHON, *arguments)
    assert (second.returncode, second.stdout.count("\n")) == (2, 1)
    assert second.stdout.startswith(f"error: runs/a is in use by process {os.getpid()} on ")
