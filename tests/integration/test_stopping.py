"""Signals and deaths of the main job's processes, for real: what is saved, what is left, how the rerun goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.processes import runs

from megavar.runs.metrics import Metrics

ROOT = Path(__file__).parents[2]
NUM_STEPS = 40
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "PYTHONWARNINGS")}


@pytest.fixture
def folder(tmp_path):
    """A run that ends after sft: there is no server to sample from."""
    rows = [{"id": f"q{n}", "question": f"{n}+1", "answer": str(n + 1), "trace": f"{n}+1={n + 1};"} for n in range(64)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(f"""
name: a
runs_dir: {tmp_path}/runs
model: {ROOT}/examples/base/qwen3-tiny
data: {{train: {tmp_path}/t.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
sft: {{num_steps: {NUM_STEPS}, batch_sequences: 64, save_interval: 1000, learning_rate: 1.0e-3}}
sample: {{sampler: policy, max_trace_tokens: 80, max_answer_tokens: 16}}
objective: {{ratio: none}}
rollout: {{mode: external, urls: [http://127.0.0.1:9]}}
logging: {{tensorboard: false}}
""")
    return tmp_path


def start(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """The main job, in a process group of its own; all that it prints goes to one file."""
    command = [*(launcher or [sys.executable]), "examples/pretrain_variational.py", "--config", f"{folder}/run.yaml"]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=CLEAN, stdout=log, stderr=log, text=True, start_new_session=True)


def steps_done(folder: Path) -> list[int]:
    return [row["step"] for row in Metrics.read(folder / "runs" / "a") if row["stage"] == "sft"]


def wait_until(holds: Callable[[], bool], seconds: float) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds, f"not after {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - started


def job_in_training(folder: Path, *launcher: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A job in the middle of sft, and its ranks."""
    job = start(folder, *launcher)
    wait_until(lambda: len(steps_done(folder)) >= 5, 120)
    command = psutil.Process(job.pid).children()
    ranks = [process for process in command if "resource_tracker" not in " ".join(process.cmdline())]
    assert len(ranks) == 2
    return job, ranks


def alive(processes: list[psutil.Process]) -> bool:
    return any(map(runs, processes))


def assert_the_rerun_trains_the_other_steps(folder: Path) -> None:
    rerun = start(folder)
    assert rerun.wait(180) == 1
    assert "is an SGLang server running there?" in (folder / "log.txt").read_text().splitlines()[-1]
    assert steps_done(folder) == list(range(1, NUM_STEPS + 1))
    assert json.loads((folder / "runs/a/manifest.json").read_text())["sft"]["status"] == "finished"
    assert not (folder / "runs/a/owner.json").exists()


def end_by_sigterm(job: subprocess.Popen[str], ranks: list[psutil.Process]) -> None:
    job.terminate()


def end_by_ctrl_c(job: subprocess.Popen[str], ranks: list[psutil.Process]) -> None:
    os.killpg(job.pid, signal.SIGINT)


def end_by_a_wish_to_one_rank(job: subprocess.Popen[str], ranks: list[psutil.Process]) -> None:
    ranks[1].send_signal(signal.SIGUSR1)


@pytest.mark.parametrize(
    ("end", "code", "name"),
    [(end_by_sigterm, 75, "SIGTERM"), (end_by_ctrl_c, 130, "SIGINT"), (end_by_a_wish_to_one_rank, 75, "SIGUSR1")],
    ids=["SIGTERM", "Ctrl-C", "one rank"],
)
def test_a_stop_saves_the_step_says_so_and_loses_nothing(folder, end, code, name):
    job, ranks = job_in_training(folder)
    end(job, ranks)
    assert job.wait(20) == code
    printed = (folder / "log.txt").read_text()
    done = steps_done(folder)[-1]
    saved = folder / "runs/a/sft/checkpoints"
    line = f"stopped by {name}: step {done} of {NUM_STEPS} is saved in {saved}; the same command goes on"
    assert printed.splitlines()[-1] == line and "Traceback" not in printed and "error" not in printed
    assert [path.name for path in saved.iterdir()] == [f"step_{done:06d}"] and done < NUM_STEPS
    assert not alive(ranks) and not (folder / "runs/a/owner.json").exists()
    before = (folder / "runs/a/metrics.jsonl").read_text()
    assert_the_rerun_trains_the_other_steps(folder)
    assert (folder / "runs/a/metrics.jsonl").read_text().startswith(before)


@pytest.mark.parametrize("launcher", [(), tuple(TORCHRUN)], ids=["forked", "torchrun"])
def test_ranks_end_with_a_killed_agent_and_a_rerun_at_once_takes_over(folder, launcher):
    job, ranks = job_in_training(folder, *launcher)
    job.kill()
    assert wait_until(lambda: not alive(ranks), 5) < 5
    assert (folder / "runs/a/owner.json").exists()
    assert_the_rerun_trains_the_other_steps(folder)
    assert f"taken over from process {ranks[0].pid} on " in (folder / "log.txt").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_with_one_line(folder, rank):
    job, ranks = job_in_training(folder)
    ranks[rank].kill()
    assert job.wait(60) == 1
    printed = (folder / "log.txt").read_text()
    assert (
        len(re.findall(rf"error: rank {1 - rank} ends: rank {rank} \(process {ranks[rank].pid}\) is gone", printed))
        == 1
    )
    assert printed.count("error:") == 1 and "Traceback" not in printed and not alive(ranks)


def test_a_second_job_on_the_run_is_refused_by_the_name_of_the_first(folder):
    job, ranks = job_in_training(folder)
    owner = json.loads((folder / "runs/a/owner.json").read_text())
    assert owner["pid"] == ranks[0].pid
    ranks[0].suspend()  # a live owner that does not end
    second = start(folder)
    assert second.wait(60) == 2
    ranks[0].resume()
    job.terminate()
    assert job.wait(20) == 75
    printed = (folder / "log.txt").read_text()
    assert f"is in use by process {ranks[0].pid} on {owner['host']}, since {owner['since']}, which lives;" in printed
