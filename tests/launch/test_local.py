"""The main job starts the ranks that its parallel layout needs, or says in one line why it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
SCRIPT = "examples/pretrain_variational.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


@pytest.fixture
def config_file(tmp_path):
    """A run whose only mistake needs the tokenizer to be seen."""
    row = {"id": "a", "question": "1+1" * 60, "answer": "2", "trace": "1+1=2;"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    (tmp_path / "run.yaml").write_text(
        f"name: a\nruns_dir: {tmp_path}/runs\nmodel: {BASE}\ndata: {{train: {tmp_path}/t.jsonl, "
        "max_sequence_tokens: 160}\nprecision: {recipe: fp32}\n"
        "sample: {max_trace_tokens: 80, max_answer_tokens: 16}\nrollout: {mode: external, urls: [http://127.0.0.1:9]}\n"
    )
    return tmp_path / "run.yaml"


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with its output in one stream, as on a terminal."""
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "PYTHONWARNINGS")}
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_mistake_is_one_line_before_ranks_are_started(config_file, under_torchrun):
    command = [*TORCHRUN, SCRIPT] if under_torchrun else [sys.executable, SCRIPT]
    done = start(*command, "--config", str(config_file), "--tp", "2")
    lines = done.stdout.splitlines()
    assert "t.jsonl, line 1: question 'a' has a gold sequence of " in lines[0] and done.stdout.count("error: ") == 1
    # Where torchrun was started by somebody else, its own report follows and its exit code is 1.
    assert (len(lines) == 1, done.returncode) == ((False, 1) if under_torchrun else (True, 2))


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_too_few_ranks_start_the_others_here_and_a_failed_stage_is_the_last_line(config_file, under_torchrun):
    """The stage before the one that samples runs on all ranks; then there is no server at the given URL."""
    text = config_file.read_text().replace("fp32}", "fp32}\nsft: {num_steps: 1}\nposterior: {train: {num_steps: 1}}")
    config_file.write_text(text)
    (config_file.parent / "t.jsonl").write_text('{"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}')
    command = [*TORCHRUN, SCRIPT] if under_torchrun else [sys.executable, SCRIPT]
    done = start(*command, "--config", str(config_file), "--tp", "2")
    started, lines = "1" if under_torchrun else "none", done.stdout.splitlines()
    assert lines[0] == f"tensor 2 x pipeline 1 x context 1 needs 2 ranks, torchrun started {started}: starting 2 here"
    entries = json.loads((config_file.parent / "runs" / "a" / "manifest.json").read_text())
    assert entries["posterior"]["status"] == "finished" and entries["sample"]["status"] == "begun"
    failure = [index for index, line in enumerate(lines) if "is an SGLang server running there?" in line]
    assert failure and done.returncode == 1 and (under_torchrun or failure[-1] == len(lines) - 1)


def test_more_than_one_node_is_told_the_exact_command(config_file):
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-1"}
    arguments = ["--config", str(config_file), "--tp", "4", "--pp", "2", "templates.system=be brief"]
    done = start(sys.executable, SCRIPT, *arguments, **ranks)
    assert done.returncode == 2
    assert done.stdout == (
        "error: the parallel layout needs 8 ranks, 2 nodes started 2; on every node run torchrun --nnodes 2 "
        "--nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node-1:29500 "
        f"{SCRIPT} --config {config_file} --tp 4 --pp 2 'templates.system=be brief'\n"
    )


def test_too_few_gpus_are_refused_with_both_numbers(config_file, tmp_path):
    """The tool that lists GPUs is replaced on the PATH: there is none here that has too few."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    done = start(
        sys.executable, SCRIPT, "--config", str(config_file), "--tp", "4", PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    assert done.returncode == 2
    assert done.stdout.startswith("error: the parallel layout needs 4 GPUs, one a rank, and this machine has 2; ")


def test_the_demos_questions_are_generated_where_they_are_missing(tmp_path):
    """Refused after that by a setting, so that nothing is trained."""
    for name in ("examples", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, str(ROOT / SCRIPT), "sample.num_traces=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.splitlines()[-1].startswith("error: sample.num_traces=0 is too small")
    assert (tmp_path / "runs/demo_data/train.jsonl").is_file() and (tmp_path / "runs/demo_data/eval.jsonl").is_file()
