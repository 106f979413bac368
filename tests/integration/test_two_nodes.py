"""Two torchrun agents are two nodes: both sample, one dies and ends the job, and a rerun with a late node goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavar.record_files import read_records
from megavar.records import Answer, Trace, identity

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).parents[2]
NUM_QUESTIONS, NUM_TRACES = 200, 4
"""So many that they last until the slower node's server is up, too."""
CONFIG = """
name: job
runs_dir: {folder}
model: {root}/examples/base/qwen3-tiny
data: {{train: {folder}/data/train.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
rollout: {{python: {root}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 8192, context_length: 256,
           concurrency: 8}}
sft: &train {{epochs: 2, batch_sequences: 16, microbatch_tokens: 1024, learning_rate: 2.0e-3}}
posterior: {{train: {{<<: *train, epochs: 1}}}}
sample: {{num_traces: 4, num_answers: 1, max_trace_tokens: 80, max_answer_tokens: 16, flush_seconds: 0.1}}
score: {{microbatch_tokens: 2048}}
objective: {{on_no_correct_trace: geometric_mean}}
policy: {{train: {{<<: *train, epochs: 1}}}}
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_node(folder: Path, node: int, port: int) -> subprocess.Popen:
    log = (folder / f"node_{node}.txt").open("a")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]  # fmt: skip
    command = [*torchrun, "-m", "megavar", "run", "--config", str(folder / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def parts_by_node(folder: Path) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {0: [], 1: []}
    for part in folder.glob("part-*.parquet"):
        found[1 if part.stem.endswith("-1") else 0].append(part)
    return found


def end(nodes: list[subprocess.Popen]) -> None:
    for node in nodes:
        if node.poll() is None:
            for child in psutil.Process(node.pid).children(recursive=True):
                child.kill()
            node.kill()
            node.wait()


def test_both_nodes_sample_and_the_death_of_one_loses_nothing_that_was_written(tmp_path):
    subprocess.run(
        [sys.executable, "examples/data/generate.py", "--out", tmp_path / "data",
         "--num-train", str(NUM_QUESTIONS), "--num-eval", "4"],
        cwd=ROOT,
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path, root=ROOT))
    traces, port = tmp_path / "job" / "round_01" / "traces", free_port()
    nodes = [start_node(tmp_path, node, port) for node in (0, 1)]
    try:
        until = time.monotonic() + 300
        while not all(parts_by_node(traces).values()):
            assert time.monotonic() < until and all(node.poll() is None for node in nodes), "not both have sampled"
            time.sleep(0.02)
        nodes[1].send_signal(signal.SIGKILL)
        kept = {identity(row): row for part in traces.glob("part-*.parquet") for row in read_records(part, Trace)}
        assert nodes[0].wait(timeout=120) != 0
        assert not (traces / "data.parquet").exists()
        port = free_port()
        nodes = [start_node(tmp_path, 0, port)]
        time.sleep(8.0)
        nodes.append(start_node(tmp_path, 1, port))
        assert [node.wait(timeout=400) for node in nodes] == [0, 0], (tmp_path / "node_0.txt").read_text()[-3000:]
    finally:
        end(nodes)
    found = {identity(row): row for row in read_records(traces / "data.parquet", Trace)}
    assert len(found) == NUM_QUESTIONS * NUM_TRACES
    for key, row in kept.items():
        assert found[key].seed == row.seed and found[key].trace_ids.tolist() == row.trace_ids.tolist()
    answers = read_records(traces.parent / "verified" / "data.parquet", Answer)
    closed = [row for row in found.values() if row.finish == "closed"]
    assert len(answers) == len(closed) > 0 and all(row.verdict for row in answers)
    assert (tmp_path / "job" / "servers" / "node_01" / "server_00.log").exists()
    assert "error" not in (tmp_path / "node_1.txt").read_text()
