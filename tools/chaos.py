"""Kills a run at random moments, again and again, and checks that nothing is lost, doubled or different.

    python tools/chaos.py --kills 100 --seed 1

A small run (two ranks, one SGLang server) is started and killed in a stage drawn at random, in one of six ways: the
whole tree, the agent alone, one rank, the server (SIGKILL), the agent by SIGTERM, the server by SIGSTOP for a while.
The same command is given again at once, until the run is finished; then the next run begins. `--full-disk` adds runs on
a small tmpfs that fills up and is enlarged (root only), `--slow-disk` kills while each sync takes 0.3 s and each write
5 ms. Each finished run is compared with an undisturbed one:

- every trace, answer, verdict, score and weight is there once;
- weights equal a float64 calculation from the stored log-probs and verdicts (docs/method.md, equation 8), to 1e-9;
- losses and exported weights of sft and posterior are bit-equal;
- 20 seconds later no process, part, temporary file, shared memory or port is left.

Prints a table (kind of kill x stage: tried, failed) and writes it to `chaos.json`; the exit code is 1 if anything
failed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
NUM_QUESTIONS, NUM_TRACES, NUM_ANSWERS = 24, 3, 2
STAGES = ("sft", "posterior", "sample", "verify", "score", "weigh", "policy", "export", "eval")
KINDS = ("tree", "agent", "rank", "server", "SIGTERM", "SIGSTOP")
SERVED = ("sample", "eval")
"""Stages in which there is a server that answers."""
KILLS_A_RUN = 8
END_SECONDS = 60.0
"""For all processes to end after a kill of one."""
LEFT_SECONDS = 20.0
"""After the end, for what it leaves."""
RUN_SECONDS = 600.0
STOPPED_SECONDS = 60.0
CONFIG = """
name: {name}
runs_dir: {runs}
model: {root}/examples/base/qwen3-tiny
data: {{train: {data}/train.jsonl, eval: {data}/eval.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
rollout: {{python: {root}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 8192, context_length: 256,
           concurrency: 8, request_timeout_seconds: 15}}
sft: &train {{epochs: 12, batch_sequences: 12, microbatch_tokens: 1024, learning_rate: 2.0e-3, save_interval: 3}}
posterior: {{train: {{<<: *train, epochs: 6}}}}
sample: {{num_traces: {traces}, num_answers: {answers}, max_trace_tokens: 80, max_answer_tokens: 16,
          flush_seconds: 0.1}}
score: {{temperature: 0.7, microbatch_tokens: 2048, chunk_sequences: 12}}
policy: {{mix_gold: true, train: {{<<: *train, epochs: 2}}}}
eval: {{num_samples: 2}}
logging: {{tensorboard: false}}
"""


@dataclass
class Campaign:
    """What all runs share, and what was counted."""

    folder: Path
    random: Random
    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_end_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def write_config(self, name: str, runs: Path) -> Path:
        """The configuration of one run."""
        file = self.folder / f"{name}.yaml"
        values = {"root": ROOT, "data": self.folder / "data", "traces": NUM_TRACES, "answers": NUM_ANSWERS}
        file.write_text(CONFIG.format(name=name, runs=runs, **values))
        return file


@dataclass
class Job:
    """One start of the main job."""

    config: Path
    run: Path
    under_torchrun: bool
    preloaded: Path | None = None
    """A library that makes the disk slow."""
    process: subprocess.Popen[bytes] = field(init=False)
    log_start: int = 0
    """Where this start's part of the log begins."""

    def __post_init__(self) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*(launcher if self.under_torchrun else [sys.executable]), "examples/pretrain_variational.py"]
        clean = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
        if self.preloaded is not None:
            clean |= {"LD_PRELOAD": str(self.preloaded), "SLOW_DISK_SYNC_MS": "300", "SLOW_DISK_WRITE_MS": "5"}
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [*command, "--config", str(self.config)], cwd=ROOT, stdout=log, stderr=log,
                env={**clean, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> Path:
        """All that the starts of this run print."""
        return self.config.with_suffix(".log")

    def tree(self) -> list[psutil.Process]:
        """The agent and everything below it."""
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            return [agent, *agent.children(recursive=True)]
        return []

    def ranks(self) -> list[psutil.Process]:
        """The training processes."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        return []

    def servers(self) -> list[psutil.Process]:
        """SGLang's main processes."""
        found = []
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if len(command) > 1 and command[1].endswith("sglang_launcher.py"):
                    found.append(process)
        return found


def stage_now(job: Job) -> str | None:
    """The stage that this start of the job is in."""
    with job.log.open(errors="replace") as log:
        log.seek(job.log_start)
        begun = re.findall(rf"^({'|'.join(STAGES)}): (?!finished|\d)", log.read(), re.MULTILINE)
    return begun[-1] if begun and begun[-1] not in finished(job.run) else None


def finished(run: Path) -> set[str]:
    """The finished stages."""
    with suppress(OSError, ValueError):
        entries = json.loads((run / "manifest.json").read_text())
        return {stage for stage, entry in entries.items() if entry["status"] == "finished"}
    return set()


def signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to each that is still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; one that ended and was not waited for does not."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill(campaign: Campaign, job: Job, kind: str) -> str | None:
    """Disturb the job; returns what went wrong with the way it ended, if it had to."""
    tree = job.tree()
    if not tree:
        return None
    if kind == "server":
        signal_all(job.servers(), signal.SIGKILL)
        return None
    if kind == "SIGSTOP":
        servers = job.servers()
        signal_all(servers, signal.SIGSTOP)
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(STOPPED_SECONDS)
        signal_all(servers, signal.SIGCONT)
        return None
    started = time.monotonic()
    if kind == "tree":
        signal_all(tree[::-1], signal.SIGKILL)
    elif kind == "agent":
        signal_all(tree[:1], signal.SIGKILL)
    elif kind == "rank":
        signal_all([campaign.random.choice(job.ranks() or tree)], signal.SIGKILL)
    else:
        signal_all(tree[:1], signal.SIGTERM)
    if kind == "agent":  # the rerun follows at once, beside what may be left
        job.process.wait()
        return None
    try:
        code = job.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        signal_all(job.tree(), signal.SIGKILL)
        return f"the job still ran {END_SECONDS:.0f} s after the kill"
    while alive(tree) and time.monotonic() - started < END_SECONDS:
        time.sleep(0.1)
    campaign.longest_end_seconds = max(campaign.longest_end_seconds, time.monotonic() - started)
    if left := alive(tree):
        names = [f"{process.pid} {process.name()} {process.status()}" for process in left]
        signal_all(left, signal.SIGKILL)
        return f"processes outlived the job: {names}"
    if kind == "SIGTERM" and not job.under_torchrun and code not in (75, 0):
        return f"exit code {code} after SIGTERM, expected 75"
    return None


def wait_for_moment(campaign: Campaign, job: Job, target: str) -> bool:
    """Wait for a random moment in a stage, or after it if it was too short; False if the job ended before."""
    delay: float | None = None
    deadline = time.monotonic() + RUN_SECONDS
    while time.monotonic() < deadline:
        if job.process.poll() is not None:
            return False
        now = stage_now(job)
        if now == target or (now is not None and STAGES.index(now) > STAGES.index(target)):
            if delay is None:
                delay = campaign.random.uniform(0.0, campaign.stage_seconds.get(target, 1.0))
                moment = time.monotonic() + delay
            if time.monotonic() >= moment or now != target:
                return True
        time.sleep(0.005)
    return True


def disturbed_run(campaign: Campaign, name: str, kills: int, slow_disk: bool) -> int:
    """Kill one run up to `kills` times, let it finish and check it; returns how many kills there were."""
    run, config = campaign.folder / "runs" / name, campaign.write_config(name, campaign.folder / "runs")
    shared_before, hits = shared_files(), list[tuple[str, str]]()
    for _ in range(2 * kills + 5):
        under_torchrun = campaign.random.random() < 0.4
        job = Job(config, run, under_torchrun, campaign.folder / "slow_disk.so" if slow_disk else None)
        disturb(campaign, job, hits, kills, slow_disk)
        try:
            job.process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            signal_all(job.tree(), signal.SIGKILL)
            fail(campaign, hits[-1:], f"{name}: did not finish within {RUN_SECONDS:.0f} s")
            return len(hits)
        if "which lives" in job.log.read_text(errors="replace"):
            fail(campaign, hits[-1:], f"{name}: a rerun was refused; see {job.log}")
            return len(hits)
        if set(STAGES) <= finished(run):
            break
    else:
        fail(campaign, hits[-1:], f"{name}: does not get on; see {job.log}")
        return len(hits)
    for problem in check(campaign, run, job, shared_before):
        fail(campaign, hits, f"{name} after {hits}: {problem}")
    if not any(problem.startswith(name) for problem in campaign.problems):
        shutil.rmtree(run)
    return len(hits)


def disturb(campaign: Campaign, job: Job, hits: list[tuple[str, str]], kills: int, slow_disk: bool) -> None:
    """Disturb a job until it has ended or there were enough kills; a killed server does not end it."""
    random = campaign.random
    while len(hits) < kills:
        left = [stage for stage in STAGES if stage not in finished(job.run)]
        if not left:
            return
        target = left[0]
        if random.random() > 0.6:  # mostly the next one: a late kill costs the time of all stages before it
            target = min(left, key=lambda stage: (sum(campaign.tried[kind, stage] for kind in KINDS), random.random()))
        if not wait_for_moment(campaign, job, target):
            return
        stage = stage_now(job) or target
        has_server = stage in SERVED and bool(job.servers())
        usable = [kind for kind in KINDS if kind not in ("server", "SIGSTOP") or has_server]
        usable = [kind for kind in usable if kind != "SIGSTOP" or campaign.tried["SIGSTOP", stage] < 2]
        kind = min(usable, key=lambda kind: (campaign.tried[kind, stage], random.random()))
        hits.append(("slow disk" if slow_disk else kind, stage))
        campaign.tried[hits[-1]] += 1
        if problem := kill(campaign, job, kind):
            fail(campaign, hits[-1:], f"{job.run.name}: {kind} in {stage}: {problem}")
        if kind not in ("server", "SIGSTOP"):
            return


def fail(campaign: Campaign, hits: list[tuple[str, str]], problem: str) -> None:
    """Count a failure for the kills that may have led to it."""
    campaign.problems.append(problem)
    campaign.failed.update(hits)
    print(problem, flush=True)


# -- checks --


def rows(folder: Path) -> list[dict[str, Any]]:
    """Records as pyarrow reads them."""
    found: list[dict[str, Any]] = pq.read_table(folder / "data.parquet").to_pylist()
    return found


def check(campaign: Campaign, run: Path, job: Job, shared_before: set[str]) -> list[str]:
    """What is wrong with a finished run."""
    problems = [*check_identities(run), *check_weights(run)]
    for stage in ("sft", "posterior"):
        if losses(run, stage) != campaign.losses[stage]:
            problems.append(f"the losses of {stage} differ from those of the undisturbed run")
    if digests(run) != campaign.digests:
        problems.append("weights differ from those of the undisturbed run")
    ended = time.monotonic()
    left = leftovers(run, job, shared_before)
    while left and time.monotonic() - ended < LEFT_SECONDS:
        time.sleep(0.5)
        now = leftovers(run, job, shared_before)
        left = [item for item in left if item in now]  # what others share for a moment is not left by us
    return problems + [f"{LEFT_SECONDS:.0f} s after the end there is {item}" for item in left]


def check_identities(run: Path) -> list[str]:
    """Every record once, and none besides."""
    folder = run / "round_01"
    traces = rows(folder / "traces")
    identities = {row["question_id"] for row in traces}
    expected = {(question, k) for question in identities for k in range(NUM_TRACES)}
    problems = [] if len(identities) == NUM_QUESTIONS else [f"traces of {len(identities)} of {NUM_QUESTIONS} questions"]
    closed = {(row["question_id"], row["trace_index"]) for row in traces if row["finish"] == "closed"}
    answers = {(*key, n) for key in closed for n in range(NUM_ANSWERS)}
    for name, wanted in (("traces", expected), ("scores", expected), ("weights", expected)):
        keys = Counter(
            (row["question_id"], row["trace_index"]) for row in rows(folder / name) if row["trace_index"] >= 0
        )
        problems += _compare(name, keys, wanted)
    for name in ("answers", "verified"):
        keys3 = Counter((row["question_id"], row["trace_index"], row["answer_index"]) for row in rows(folder / name))
        problems += _compare(name, keys3, answers)
    if any(row["verdict"] not in ("correct", "wrong", "no_answer") for row in rows(folder / "verified")):
        problems.append("an answer without a judgement")
    return problems


def _compare(name: str, found: Counter[Any], wanted: set[Any]) -> list[str]:
    lost, doubled = len(wanted - found.keys()), sum(count > 1 for count in found.values())
    others = len(found.keys() - wanted)
    return [f"{name}: {lost} lost, {doubled} doubled, {others} others"] if lost or doubled or others else []


def check_weights(run: Path) -> list[str]:
    """Weights of the bound, calculated here."""
    folder = run / "round_01"
    correct: dict[tuple[str, int], list[bool]] = {}
    for row in rows(folder / "verified"):
        correct.setdefault((row["question_id"], row["trace_index"]), []).append(row["verdict"] == "correct")
    log_weights: dict[str, dict[int, float]] = {}
    for row in rows(folder / "scores"):
        group = log_weights.setdefault(row["question_id"], {})
        verdicts = correct.get((row["question_id"], row["trace_index"]), [])
        if not row["logp_policy"] or not any(verdicts):
            group[row["trace_index"]] = -np.inf
            continue
        difference = np.array(row["logp_policy"]) - np.array(row["logp_posterior"])
        group[row["trace_index"]] = float(difference.mean()) + float(np.log(sum(verdicts) / len(verdicts)))
    largest = 0.0
    for row in rows(folder / "weights"):
        group = log_weights[row["question_id"]]
        values = np.array(list(group.values()), np.float64)
        total = np.exp(values - values.max()).sum() if np.isfinite(values.max()) else np.inf
        expected = np.exp(group[row["trace_index"]] - values.max()) / total if np.isfinite(total) else 0.0
        largest = max(largest, abs(float(expected) - row["weight"]))
    return [f"a weight differs by {largest:.1e}"] if largest > 1e-9 else []


def losses(run: Path, stage: str) -> list[float]:
    """Of all rows of a training stage, in order of the steps."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_stage = [(row["step"], row["loss"]) for row in found if row["stage"] == stage]
    return [loss for _, loss in sorted(of_stage)]


def digests(run: Path) -> dict[str, str]:
    """Of the exported weights of pi_0 and q."""
    folders = {"sft": run / "sft" / "hf", "posterior": run / "round_01" / "posterior" / "hf"}
    return {
        stage: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for stage, folder in folders.items()
    }


def shared_files() -> set[str]:
    """Shared memory, and temporary folders of servers."""
    return {str(path) for pattern in ("/dev/shm/*", "/tmp/sglang-*") for path in Path("/").glob(pattern[1:])}


def leftovers(run: Path, job: Job, shared_before: set[str]) -> list[str]:
    """What a finished run should not leave."""
    found = [
        f"process {process.pid}: {' '.join(process.info['cmdline'])[:100]}"
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and f"{run.name}" in " ".join(process.info["cmdline"] or [])
    ]
    odd = re.compile(r"^part-|\.tmp$|\.partial$|\.replaced$|^owner\.json$|\.damaged$")
    found += [str(path) for path in run.rglob("*") if odd.search(path.name)]
    found += sorted(shared_files() - shared_before)
    for port in set(re.findall(r"--port (\d+)", (run / "servers" / "server_00.log").read_text(errors="replace"))):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                found.append(f"a listener on port {port}")
    return found


# -- a disk that fills up --


def full_disk_run(campaign: Campaign, number: int) -> None:
    """A run on a small tmpfs that is enlarged a little whenever the run has ended for want of space."""
    name, disk = f"full_{number:03d}", campaign.folder / f"disk_{number:03d}"
    disk.mkdir()
    megabytes = campaign.random.uniform(1.0, 4.0)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1e6)}", "none", disk], check=True)
    config, run, shared_before = campaign.write_config(name, disk), disk / name, shared_files()
    try:
        for _ in range(40):
            job = Job(config, run, under_torchrun=False)
            stage: str | None = None
            while job.process.poll() is None:
                stage = stage_now(job) or stage
                time.sleep(0.05)
            if job.process.returncode == 0:
                break
            hit = ("full disk", stage or STAGES[0])
            campaign.tried[hit] += 1
            printed = job.log.read_text(errors="replace")
            if "Traceback" in printed or "free" not in printed.splitlines()[-1]:
                fail(campaign, [hit], f"{name}: a full disk in {stage} is not one line: {printed[-300:]!r}")
                job.log.write_text("")
            megabytes += campaign.random.uniform(1.0, 6.0)
            subprocess.run(["mount", "-o", f"remount,size={int(megabytes * 1e6)}", "none", disk], check=True)
        for problem in check(campaign, run, job, shared_before):
            fail(campaign, [("full disk", "eval")], f"{name}: {problem}")
    finally:
        subprocess.run(["umount", disk], check=False)


# -- the campaign --


def undisturbed_run(campaign: Campaign) -> None:
    """The run that all others are compared with."""
    run = campaign.folder / "runs" / "reference"
    job = Job(campaign.write_config("reference", campaign.folder / "runs"), run, under_torchrun=False)
    if job.process.wait() != 0:
        raise SystemExit(f"the undisturbed run failed; see {job.log}")
    entries = json.loads((run / "manifest.json").read_text())
    campaign.stage_seconds = {stage: entries[stage]["seconds"] for stage in STAGES}
    campaign.losses = {stage: losses(run, stage) for stage in ("sft", "posterior")}
    campaign.digests = digests(run)
    if problems := check_identities(run) + check_weights(run):
        raise SystemExit(f"the undisturbed run is wrong: {problems}")


def table(campaign: Campaign) -> Table:
    """Kind of kill x stage: tried, and how many of those may have led to a failure."""
    kinds = [
        *KINDS,
        *(kind for kind in ("slow disk", "full disk") if any(kind == tried for tried, _ in campaign.tried)),
    ]
    found = Table("kind", *STAGES, "tried", "failed")
    for kind in kinds:
        cells = []
        for stage in STAGES:
            tried, failed = campaign.tried[kind, stage], campaign.failed[kind, stage]
            cells.append(f"{tried}{f' ({failed} failed)' if failed else ''}" if tried else "")
        totals = [sum(counter[kind, stage] for stage in STAGES) for counter in (campaign.tried, campaign.failed)]
        found.add_row(kind, *cells, *map(str, totals))
    return found


def main() -> int:
    """Read the arguments, kill, check, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--full-disk", type=int, default=0, metavar="N", help="runs on a disk that fills up")
    parser.add_argument(
        "--slow-disk", type=int, default=0, metavar="N", help="kills while the disk is slow (needs gcc)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/chaos"), help="folder of the runs (failed ones are kept)"
    )
    chosen = parser.parse_args()
    campaign = Campaign(chosen.out.resolve(), Random(chosen.seed))
    shutil.rmtree(campaign.folder, ignore_errors=True)
    campaign.folder.mkdir(parents=True)
    generate = [sys.executable, "examples/data/generate.py", "--out", str(campaign.folder / "data")]
    sizes = ["--num-train", str(NUM_QUESTIONS), "--num-eval", "8"]
    subprocess.run([*generate, *sizes], cwd=ROOT, check=True)
    started = time.monotonic()
    undisturbed_run(campaign)
    console = Console(width=140)
    console.print(f"undisturbed: {campaign.stage_seconds}, {time.monotonic() - started:.0f} s with its start")
    killed, number = 0, 0
    if chosen.slow_disk:
        library = ["gcc", "-shared", "-fPIC", "-o", str(campaign.folder / "slow_disk.so"), "tools/slow_disk.c", "-ldl"]
        subprocess.run(library, cwd=ROOT, check=True)
    wanted = chosen.kills + chosen.slow_disk
    while killed < wanted:
        number += 1
        is_slow = killed >= chosen.kills
        left = (wanted if is_slow else chosen.kills) - killed
        name = f"{'slow' if is_slow else 'run'}_{number:03d}"
        killed += disturbed_run(campaign, name, min(KILLS_A_RUN, left), is_slow)
        seconds = time.monotonic() - started
        print(f"{killed} of {wanted} kills, {number} runs, {len(campaign.problems)} problems, {seconds:.0f} s, "
              f"{seconds / killed * (wanted - killed):.0f} s left", flush=True)  # fmt: skip
    for index in range(chosen.full_disk):
        full_disk_run(campaign, index + 1)
    console.print(table(campaign))
    seconds = time.monotonic() - started
    summary = (
        f"seed {chosen.seed}: {killed} kills over {number} runs and {chosen.full_disk} full disks in {seconds:.0f} s; "
    )
    summary += f"{len(campaign.problems)} problems; the longest end after a kill {campaign.longest_end_seconds:.1f} s"
    console.print(summary)
    cells = {
        f"{kind} {stage}": [count, campaign.failed[kind, stage]] for (kind, stage), count in campaign.tried.items()
    }
    result = {
        "seed": chosen.seed,
        "kills": killed,
        "runs": number,
        "tried_failed": cells,
        "problems": campaign.problems,
    }
    (campaign.folder / "chaos.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(campaign.problems))


if __name__ == "__main__":
    sys.exit(main())
