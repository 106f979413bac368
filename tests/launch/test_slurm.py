"""Jobs of a real Slurm with two nodes on this machine: finished, refused, cancelled, out of time, preempted, killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from helpers.nemo import EXECUTORS, NEMO_PYTHON, needs_nemo
from helpers.slurm import MISSING, REASON, LoopbackSlurm

from megavar.runs.metrics import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=REASON)]

ROOT = Path(__file__).parents[2]
NUM_STEPS = 24
PARTITIONS = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODES = "nodes: 2\ngpus_per_node: 0\nranks_per_node: 1\ncpus_per_node: 4\ntime: '0:10:00'\nwarn_seconds: 60\n"
UNTIL_SAMPLE = """
sample: {sampler: policy, max_trace_tokens: 80, max_answer_tokens: 16}
objective: {ratio: none}
rollout: {mode: external, urls: [http://127.0.0.1:9]}
"""
"""The run fails after sft: there is no server to sample from."""
TO_THE_END = f"""
posterior: {{train: {{num_steps: 2}}}}
sample: {{max_trace_tokens: 40, max_answer_tokens: 8, num_traces: 2, num_answers: 1}}
objective: {{on_no_correct_trace: gold}}
policy: {{train: {{num_steps: 2}}}}
rollout: {{python: {ROOT}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 16384, context_length: 256}}
"""


@contextmanager
def running_slurm(proctrack: str) -> Iterator[LoopbackSlurm]:
    """Not in pytest's folder, which others cannot enter: munge asks that its socket can be reached by all."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        LoopbackSlurm(Path(folder), PARTITIONS, proctrack) as it,
    ):
        yield it


@pytest.fixture(scope="module")
def slurm():
    with running_slurm("pgid") as running:
        yield running


@pytest.fixture(scope="module")
def cgroup_slurm():
    with running_slurm("cgroup") as running:
        yield running


@pytest.fixture
def folder(tmp_path):
    rows = [{"id": f"q{n}", "question": f"{n}+1", "answer": str(n + 1), "trace": f"{n}+1={n + 1};"} for n in range(64)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "nodes.yaml").write_text(NODES)
    write_run(tmp_path, UNTIL_SAMPLE)
    return tmp_path


def write_run(folder: Path, stages: str, name: str = "run.yaml", save_interval: int = 1000) -> None:
    (folder / name).write_text(f"""
name: a
runs_dir: {folder}/runs
model: {ROOT}/examples/base/qwen3-tiny
data: {{train: {folder}/t.jsonl, max_sequence_tokens: 160, questions_per_round: 8}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
sft: {{num_steps: {NUM_STEPS}, batch_sequences: 64, save_interval: {save_interval}, learning_rate: 1.0e-3}}
logging: {{tensorboard: false}}
{stages}""")


def command(folder: Path, *arguments: str) -> list[str]:
    """By the script of `--executor nodes.yaml`, or where the folder has executors, by NeMo-Run."""
    executors = folder / "executors.py"
    python = NEMO_PYTHON if executors.exists() else sys.executable
    launch = [str(python), "-m", "megavar", "launch", "--config", f"{folder}/run.yaml"]
    if executors.exists():
        return [*launch, "--executors", str(executors), "--executor", "two_nodes", *arguments]
    return [*launch, "--executor", f"{folder}/nodes.yaml", *arguments]


def environment(slurm: LoopbackSlurm) -> dict[str, str]:
    return {**slurm.environment, "PYTHONPATH": str(ROOT)}


def done(slurm: LoopbackSlurm, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ask(slurm: LoopbackSlurm, action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return done(slurm, sys.executable, "-m", "megavar", "launch", action, f"{folder}/runs/a")


def job_of(folder: Path) -> str:
    return (folder / "runs" / "a" / "launch" / "job_id").read_text().strip()


def sft_losses(folder: Path) -> dict[int, float]:
    rows = [row for row in Metrics.read(folder / "runs" / "a") if row["stage"] == "sft"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # none twice, none left out
    return {row["step"]: row["loss"] for row in rows}


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, f"not after {seconds} s"
        time.sleep(0.1)


def followed(slurm: LoopbackSlurm, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`megavar launch --wait` of a job."""
    with (folder / "printed.txt").open("w") as printed:
        return subprocess.Popen(
            command(folder, "--wait", *arguments), cwd=ROOT, env=environment(slurm), stdout=printed, stderr=printed
        )


def wait_for_training(folder: Path) -> None:
    """Until a job is in the middle of sft."""
    wait_until(lambda: (folder / "runs/a/metrics.jsonl").exists() and len(sft_losses(folder)) >= 4, 180)


def assert_the_curve_is_an_undisturbed_ones(folder: Path) -> None:
    """To the bit: the same ranks do the same sums."""
    losses = sft_losses(folder)
    local = [sys.executable, "-m", "megavar", "launch", "--config", f"{folder}/run.yaml", "name=undisturbed"]
    subprocess.run(local, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    rows = Metrics.read(folder / "runs" / "undisturbed")
    assert losses == {row["step"]: row["loss"] for row in rows if row["stage"] == "sft"}
    assert len(losses) == NUM_STEPS


@pytest.fixture(scope="module")
def failed_job(slurm, tmp_path_factory):
    """A job by the plain script, whose questions are gone when it starts."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "t.jsonl").write_text('{"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}')
    (folder / "nodes.yaml").write_text(NODES)
    write_run(folder, UNTIL_SAMPLE)
    printed = done(slurm, *command(folder, "--dry-run"))
    assert printed.returncode == 0
    (folder / "job.sh").write_text(printed.stdout)
    (folder / "t.jsonl").unlink()
    assert done(slurm, "sbatch", str(folder / "job.sh")).returncode == 0
    wait_until(lambda: (folder / "runs/a/launch/job_id").exists(), 30)
    wait_until(lambda: ask(slurm, "status", folder).returncode != 0, 60)
    return folder


def test_the_plain_script_works_and_a_mistake_is_neither_done_nor_requeued(slurm, failed_job):
    status = ask(slurm, "status", failed_job)
    assert status.returncode == 2 and f"job {job_of(failed_job)} FAILED" in status.stdout
    assert "exit code 2\n" in status.stdout and "restart" not in status.stdout
    logs = failed_job / "runs" / "a" / "logs"
    assert os.readlink(logs / "latest") == f"{job_of(failed_job)}.0"
    assert "error: No question file" in (logs / "latest" / "node_0.log").read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("partition: none", "sbatch refused the job: invalid partition specified: none; "),
        ("gpus_per_node: 1", "sbatch refused the job: "),
    ],
)
def test_what_slurm_refuses_is_one_line(slurm, folder, setting, message):
    key = setting.partition(":")[0]
    kept = [line for line in NODES.splitlines() if not line.startswith(f"{key}:")]
    (folder / "nodes.yaml").write_text("\n".join([*kept, setting]))
    refused = done(slurm, *command(folder))
    assert refused.returncode == 2 and refused.stdout.count("\n") == 1
    assert refused.stdout.startswith(f"error: {message}")
    assert not (folder / "runs" / "a" / "launch" / "job_id").exists()


@pytest.mark.sglang
def test_a_node_without_the_servers_environment_is_named_before_ranks_are_started(slurm, folder):
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exit 1\nexec {ROOT}/.venv-sglang/bin/python "$@"\n')
    python.chmod(0o755)
    write_run(folder, TO_THE_END.replace(f"{ROOT}/.venv-sglang/bin/python", str(python)))
    launched = done(slurm, *command(folder, "--wait"))
    *_, error, state = launched.stdout.splitlines()
    assert error.startswith(
        f"node_1.log: error: node n2: rollout.python={python} cannot import sglang; run `make sglang`"
    )
    assert launched.returncode == 2 and state == f"job {job_of(folder)} FAILED (NonZeroExitCode), exit code 2"
    assert not (folder / "runs" / "a" / "metrics.jsonl").exists()


@pytest.mark.sglang
def test_a_cancelled_job_saves_and_ends_and_the_next_one_finishes_the_run(slurm, folder):
    """No second one is submitted before that."""
    write_run(folder, TO_THE_END)
    launcher = followed(slurm, folder)
    wait_until(lambda: slurm.ask("squeue", "--noheader", "--format=%T") == "RUNNING", 180)
    wait_until(lambda: (folder / "runs/a/launch/job_id").exists(), 60)
    job = job_of(folder)
    second = done(
        slurm, *command(folder)
    )  # while ranks start: during sft, a busy machine would finish the run meanwhile
    assert second.returncode == 2 and f"job {job} RUNNING on n[1-2] already; wait for it" in second.stdout
    wait_for_training(folder)
    assert ask(slurm, "cancel", folder).returncode == 0
    assert launcher.wait(90) != 0
    assert f"job {job} CANCELLED" in (folder / "printed.txt").read_text().splitlines()[-1]
    step = max(sft_losses(folder))
    assert [saved.name for saved in (folder / "runs/a/sft/checkpoints").iterdir()] == [f"step_{step:06d}"]
    assert step < NUM_STEPS and slurm.ask("squeue", "--noheader") == ""

    launched = done(slurm, *command(folder, "--wait"))
    assert launched.returncode == 0, launched.stdout
    lines, next_job = launched.stdout.splitlines(), job_of(folder)
    assert next_job != job and lines[0].startswith(f"job {next_job} is submitted")
    assert lines[-1] == f"job {next_job} COMPLETED on n[1-2], exit code 0"
    assert f"sft: {NUM_STEPS} of {NUM_STEPS} steps" in launched.stdout  # rank 0's log
    assert max(sft_losses(folder)) == NUM_STEPS and (folder / "runs" / "a" / "hf" / "config.json").is_file()
    assert {file.name for file in (folder / "runs/a/logs/latest/").iterdir()} == {"job.log", "node_0.log", "node_1.log"}


@pytest.mark.parametrize(
    ("system", "by"),
    [("slurm", "script"), pytest.param("cgroup_slurm", "nemo", marks=needs_nemo)],
    ids=["pgid", "cgroup"],
)
def test_a_job_goes_on_after_preemption_a_killed_agent_and_the_time_limit_and_one_without_progress_ends(
    system, by, folder, request
):
    """Starts 0 and 2 save in the time given, start 1 loses an agent, start 3 fails after sft and ends it."""
    slurm = request.getfixturevalue(system)
    write_run(folder, UNTIL_SAMPLE, save_interval=2)
    (folder / "nodes.yaml").write_text(f"{NODES.replace('seconds: 60', 'seconds: 90')}partition: low\n")
    if by == "nemo":
        (folder / "executors.py").write_text(EXECUTORS)
    launcher = followed(slurm, folder, "--max-requeues", "3")
    wait_for_training(folder)
    job, logs = job_of(folder), folder / "runs" / "a" / "logs"
    urgent = ["sbatch", "--partition=high", "--nodes=2", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1"]
    assert done(slurm, *urgent).returncode == 0
    wait_until(lambda: (logs / f"{job}.1").is_dir(), 120)
    assert "stopped by SIGTERM: step " in (logs / f"{job}.0" / "node_0.log").read_text()

    wait_until_trained(folder, 4)
    agent = agent_of(folder, "1")
    ranks = agent.children()
    agent.send_signal(signal.SIGKILL)
    wait_until(lambda: (logs / f"{job}.2").is_dir(), 120)
    assert not any(rank.is_running() for rank in ranks)

    wait_until_trained(folder, 2)
    reach_time_limit(slurm, folder, job)
    wait_until(lambda: (logs / f"{job}.3").is_dir(), 120)
    set_time_limit(slurm, job, 30)
    assert "stopped by SIGTERM: step " in (logs / f"{job}.2" / "node_0.log").read_text()
    assert "stopped before the end\nrequeued\n" in (logs / f"{job}.2" / "job.log").read_text()

    assert launcher.wait(300) == 1
    printed = (folder / "printed.txt").read_text()
    assert printed.splitlines()[-1].startswith(f"job {job} FAILED") and "restart 3, exit code 1" in printed
    wait_until(lambda: slurm.ask("scontrol", "show", "job", job) == "", 90)
    assert ask(slurm, "status", folder).stdout.startswith(f"job {job} FAILED, restart 3, exit code 1\n")
    assert "job.log: error: requeued 3 times (--max-requeues) already; submitting again goes on\njob " in printed
    assert_the_curve_is_an_undisturbed_ones(folder)
    if by == "nemo":
        return

    assert done(slurm, "sbatch", f"{folder}/runs/a/launch/job.sh").returncode == 0
    wait_until(lambda: job_of(folder) != job, 30)
    wait_until(lambda: ask(slurm, "status", folder).returncode != 0, 120)
    last = (logs / f"{job_of(folder)}.0" / "job.log").read_text()
    assert last.endswith("failed with exit code 1\nerror: no progress since this start, so the job is not requeued\n")


def wait_until_trained(folder: Path, steps: int) -> None:
    """For so many steps more than now."""
    before = max(sft_losses(folder))
    wait_until(lambda: max(sft_losses(folder)) >= before + steps, 180)


def reach_time_limit(slurm: LoopbackSlurm, folder: Path, job: str) -> None:
    """Slurm looks at limits twice a minute; until it has warned, the ranks stand still."""
    ranks = [rank for node in ("0", "1") for rank in agent_of(folder, node).children()]
    for rank in ranks:
        rank.suspend()
    minutes = int(slurm.ask("squeue", "--noheader", "--format=%M", "--jobs", job).split(":")[-2])
    set_time_limit(slurm, job, minutes + 2)
    try:
        wait_until(lambda: all(map(is_told_to_stop, ranks)), 60)
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()


def set_time_limit(slurm: LoopbackSlurm, job: str, minutes: int) -> None:
    assert done(slurm, "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}").returncode == 0


def is_told_to_stop(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a suspended process to go on, or has arrived: Slurm sends SIGCONT, too."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    waiting = int(status.partition("ShdPnd:")[2].split()[0], 16)
    return "(stopped)" not in status or bool(waiting >> (signal.SIGTERM - 1) & 1)


def agent_of(folder: Path, node: str) -> psutil.Process:
    (agent,) = [process for process in psutil.process_iter() if is_agent_of(process, folder, node)]
    return agent


def is_agent_of(process: psutil.Process, folder: Path, node: str) -> bool:
    try:
        words, variables = process.cmdline(), process.environ()
        parent = process.parent()
    except psutil.Error:
        return False
    ours = "megavar.launch.node" in words and f"{folder}/run.yaml" in words and variables.get("SLURM_NODEID") == node
    return ours and parent is not None and "slurmstepd" in parent.name()


def test_a_job_that_the_controller_has_forgotten_is_still_not_reported_as_done(slurm, failed_job):
    job = job_of(failed_job)
    wait_until(lambda: slurm.ask("scontrol", "show", "job", job) == "", 90)
    status = ask(slurm, "status", failed_job)
    assert status.returncode == 2 and status.stdout.startswith(f"job {job} FAILED, exit code 2\n")
