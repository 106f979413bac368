"""Benchmarks `megavar launch` on a Slurm of two nodes on this machine: seconds to the first step, and a requeue's cost.

    python tools/bench_launch.py [--pairs N]

A run of two ranks, one a node, is submitted and timed until the first training step is logged. It is then requeued by
Slurm in the middle of training; what a preemption costs is the time from then to the next new step. Medians over the
pairs. The time that the controller lets pass before a requeued job starts (`cred_expire`, here 5 s) is in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.slurm import MISSING, REASON, LoopbackSlurm  # noqa: E402

from megavar.runs.metrics import Metrics  # noqa: E402

LIMIT_SECONDS = 300.0
RUN = """
name: bench
runs_dir: {folder}/runs
model: {root}/examples/base/qwen3-tiny
data: {{train: {folder}/t.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
sft: {{num_steps: 100000, batch_sequences: 8, save_interval: 100000}}
sample: {{sampler: policy, max_trace_tokens: 80, max_answer_tokens: 16}}
objective: {{ratio: none}}
rollout: {{mode: external, urls: [http://127.0.0.1:9]}}
logging: {{tensorboard: false}}
"""
NODES = "nodes: 2\ngpus_per_node: 0\nranks_per_node: 1\ncpus_per_node: 4\n"


def main() -> int:
    """Print the medians; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time the start of a Slurm job and the cost of a requeue.")
    parser.add_argument("--pairs", type=int, default=3, help="starts and requeues (default: 3)")
    pairs = parser.parse_args().pairs
    if MISSING:
        print(f"error: {REASON}")
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, LoopbackSlurm(Path(folder)) as slurm:
        times = [measure(slurm) for _ in range(pairs)]
    for index, name in enumerate(
        ("submitted", "first step", "requeue: saved", "requeue: started", "requeue: next step")
    ):
        column = [row[index] for row in times]
        print(f"{name:20} {statistics.median(column):6.1f} s  ({min(column):.1f} to {max(column):.1f})")
    return 0


def measure(slurm: LoopbackSlurm) -> tuple[float, ...]:
    """Seconds from `megavar launch` until it has submitted and until the first step; from the requeue until the ranks
    have saved, the job starts again, and a new step is done.
    """  # fmt: skip
    environment = {**slurm.environment, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = {"id": "q", "question": "1+1", "answer": "2", "trace": "1+1=2;"}
        (folder / "t.jsonl").write_text(json.dumps(row))
        (folder / "run.yaml").write_text(RUN.format(folder=folder, root=ROOT))
        (folder / "nodes.yaml").write_text(NODES)
        run = folder / "runs" / "bench"
        begun = time.monotonic()
        launch = [sys.executable, "-m", "megavar", "launch", "--config", f"{folder}/run.yaml"]
        subprocess.run([*launch, "--executor", f"{folder}/nodes.yaml"], cwd=ROOT, env=environment, check=True)
        submitted = time.monotonic() - begun
        first = wait(lambda: steps(run) >= 1) - begun
        wait(lambda: steps(run) >= 10)
        job = (run / "launch" / "job_id").read_text().strip()
        begun = time.monotonic()
        slurm.ask("scontrol", "requeue", job)
        saved = wait(lambda: any((run / "sft" / "checkpoints").glob("step_*"))) - begun
        last = steps(run)
        started = wait(lambda: (run / "logs" / f"{job}.1").is_dir()) - begun
        again = wait(lambda: steps(run) > last) - begun
        slurm.ask("scancel", job)
        wait(lambda: not slurm.ask("squeue", "--noheader"))
    return submitted, first, saved, started, again


def steps(run: Path) -> int:
    """Training steps that the run has logged."""
    return len(Metrics.read(run)) if (run / "metrics.jsonl").exists() else 0


def wait(holds: Callable[[], bool]) -> float:
    """The time when it holds."""
    limit = time.monotonic() + LIMIT_SECONDS
    while not holds():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {LIMIT_SECONDS} s")
        time.sleep(0.05)
    return time.monotonic()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
