"""Controlled comparison of the methods (`make evidence`): same questions, base model, seeds and optimizer steps.

    python examples/evidence.py [--tasks chains unknown] [--seeds 1 2 3] [--methods iwae rft ...]

For each task and seed, the run `iwae` is the paper's method with the first 8 of 16 traces per question. Other runs
reuse stages of a run with the same settings (files are hard-linked, manifest entries copied, and the pipeline checks
that the settings agree), so methods differ only in the settings compared. All policies train for the same number of
steps and batch size; `more_sft` and `rft_more_steps` also train for the steps of the models that they do not need.
Two runs execute concurrently, each a single rank with one of two servers, which are started once. Their output goes to
runs/evidence/logs. Results are written to runs/evidence/results.json after each run, so the command is resumable: a run
whose result is there with the same settings is skipped.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megavar.config.load import load_config
from megavar.data.questions import read_questions
from megavar.disk import atomic_write
from megavar.progress import ProgressLine
from megavar.record_files import read_records
from megavar.records import Answer, Question, Trace
from megavar.rollout import watchdog
from megavar.rollout.sglang_servers import ManagedServers, open_engine

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "conf/demo.yaml"
RUNS = Path("runs/evidence")
RESULTS = RUNS / "results.json"
KEY = "EVIDENCE_SERVER_KEY"
"""Environment variable with the API key of the servers."""
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""The environment that torchrun would set for a single rank."""
STEPS = {
    "chains": {"sft": 52, "posterior.train": 52, "policy.train": 64},
    "unknown": {"sft": 80, "posterior.train": 100, "policy.train": 120},
}
"""Optimizer steps of 64 sequences."""
OUTPUTS = {
    "sft": ["sft"],
    "rollouts": ["round_01/rollouts"],
    "posterior": ["round_01/posterior"],
    "sample": ["round_01/traces", "round_01/answers"],
    "verify": ["round_01/verified"],
    "score": ["round_01/scores"],
    "weigh": ["round_01/weights"],
    "policy": ["round_01/policy"],
    "export": [],
    "eval": ["eval"],
}
"""Stage -> its outputs in the run folder, in the order of the stages."""


@dataclass(frozen=True)
class Method:
    """Settings of a method, and the method whose stages, up to and including `until`, its run reuses."""

    overrides: tuple[str, ...] = ()
    shared_with: str | None = None
    until: str | None = None
    takes_steps: tuple[str, ...] = ()
    """Training stages; the first one trains for the total optimizer steps of all of them."""


@dataclass(frozen=True)
class Job:
    """One run."""

    task: str
    method: str
    seed: int


EIGHT = ("sample.num_traces=8",)
OWN_TRACES = (*EIGHT, "sample.sampler=policy", "objective.ratio=none")
ROLLOUT = (*EIGHT, "posterior.source=rollout")
METHODS = {
    "iwae": Method(),
    "more_sft": Method(("eval.models=[pi_0]",), takes_steps=("sft", "posterior.train", "policy.train")),
    "ratio_none": Method(("objective.ratio=none",), "iwae", "score"),
    "ratio_sequence": Method(("objective.ratio=sequence",), "iwae", "score"),
    "no_hint": Method(OWN_TRACES, "iwae", "sft"),
    "rft": Method((*OWN_TRACES, "objective.name=rft"), "no_hint", "score"),
    "rft_more_steps": Method(
        (*OWN_TRACES, "objective.name=rft"), "no_hint", "score", takes_steps=("policy.train", "posterior.train")
    ),
    "grpo": Method((*OWN_TRACES, "objective.name=grpo"), "no_hint", "score"),
    "forward_kl": Method(ROLLOUT, "iwae", "sft"),
    "forward_kl_ratio_sequence": Method((*ROLLOUT, "objective.ratio=sequence"), "forward_kl", "score"),
    "answer_geometric_mean": Method(
        ("objective.answer_estimator=geometric_mean", "objective.train_answers=reference"), "iwae", "score"
    ),
    "answer_likelihood": Method(
        ("objective.answer_estimator=likelihood", "objective.train_answers=reference"), "iwae", "score"
    ),
    **{f"k{k}": Method((f"objective.num_traces={k}",), "iwae", "score") for k in (1, 2, 4, 16)},
    "rounds_3": Method((*ROLLOUT, "rounds=3"), "forward_kl", "eval"),
    "reverse_kl_rounds_3": Method(
        (*EIGHT, "rounds=3", "posterior.source=reverse_kl", "posterior.allow_collapse=true"), "iwae", "sft"
    ),
}


def make_data(task: str) -> None:
    """Generate the questions of a task if they do not exist."""
    folder = RUNS / f"{task}_data"
    if not (folder / "train.jsonl").exists():
        command = [sys.executable, str(ROOT / "examples/data/generate.py"), "--task", task, "--out", str(folder)]
        subprocess.run([*command, "--num-eval", "200"], check=True)


def share(source: Path, target: Path, until: str) -> None:
    """Initialise the run `target` with the stages of `source` up to `until`, unless it has a manifest.

    Hard-links the outputs and copies the entries of manifest and metrics.
    """
    if (target / "manifest.json").exists():
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stages = list(OUTPUTS)[: list(OUTPUTS).index(until) + 1]
    for folder in (folder for stage in stages for folder in OUTPUTS[stage]):
        if (source / folder).exists():
            shutil.copytree(source / folder, partial / folder, copy_function=os.link)
    if "export" in stages:
        (partial / "hf").symlink_to("round_01/policy/hf")
    entries = json.loads((source / "manifest.json").read_text())
    reused = {key: entries[key] for key in entries if key in stages}
    (partial / "manifest.json").write_text(json.dumps(reused, indent=2))
    rows = (source / "metrics.jsonl").read_text().splitlines()
    kept = [row for row in rows if json.loads(row)["stage"] in stages]
    (partial / "metrics.jsonl").write_text("".join(row + "\n" for row in kept))
    os.replace(partial, target)


def settings(task: str, seed: int, name: str) -> list[str]:
    """Configuration overrides of a run, relative to conf/demo.yaml."""
    method, data = METHODS[name], RUNS / f"{task}_data"
    overrides = [
        f"runs_dir={RUNS / task}",
        f"name={name}_{seed}",
        f"seed={seed}",
        f"data.train={data / 'train.jsonl'}",
        f"data.eval={data / 'eval.jsonl'}",
        "data.questions_per_round=200",
        "data.max_sequence_tokens=224",
        "sample.num_traces=16",
        "sample.num_answers=2",
        "sample.max_trace_tokens=128",
        "objective.num_traces=8",
        *(f"{stage}.num_steps={steps}" for stage, steps in STEPS[task].items()),
        *method.overrides,
    ]
    if method.takes_steps:
        overrides.append(f"{method.takes_steps[0]}.num_steps={sum(STEPS[task][stage] for stage in method.takes_steps)}")
    if method.until is not None:
        overrides.append("eval.models=[policy]")  # pi_0 is evaluated by the run whose stages are reused
    return overrides


def collapsed(folder: Path) -> bool:
    """Whether a run failed because no trace of its last round has weight, which is a valid result."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    counts = [row["questions_with_weight"] for row in rows if row["stage"] == "weigh"]
    return bool(counts) and counts[-1] == 0


async def run(task: str, seed: int, name: str, url: str) -> Path:
    """Run one method, after the method whose stages it reuses; finished stages are skipped.

    Args:
        url: of the server to use.

    Raises:
        RunFailed: naming the log file.
    """
    method, overrides, target = METHODS[name], settings(task, seed, name), RUNS / task / f"{name}_{seed}"
    done, made_by = target / "done", json.dumps(overrides)
    if done.exists() and done.read_text() == made_by:  # otherwise the run itself reports the differing setting
        return target
    if method.shared_with is not None and method.until is not None:
        share(await run(task, seed, method.shared_with, url), target, method.until)
    overrides += ["rollout.mode=external", f"rollout.urls=[{url}]", f"rollout.api_key_env={KEY}"]
    log = RUNS / "logs" / f"{task}_{name}_{seed}.log"
    for stage in ("sft", "eval") if name == "more_sft" else ("run",):
        await launch(stage, overrides, log)
    done.write_text(made_by)
    return target


class RunFailed(Exception):
    """A run failed; the message is the path of its log file."""


async def launch(stage: str, overrides: list[str], log: Path) -> None:
    """Run one megavar command as a single rank; a watchdog kills it if this process dies.

    Raises:
        RunFailed: if it exits with an error.
    """
    command = [sys.executable, "-m", "megavar", stage, "--config", str(CONFIG), *overrides]
    guarded = [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), *command]
    environment = {**os.environ, **ONE_RANK, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *guarded, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        if await process.wait():
            raise RunFailed(str(log))


def result(folder: Path, held_out: list[Question]) -> dict[str, object]:
    """Results of a run: accuracy of every policy, tokens and seconds per stage, statistics of traces and weights.

    The last stage of a collapsed run has no seconds.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens: dict[str, float] = {}
    for row in rows:
        tokens[row["stage"]] = tokens.get(row["stage"], 0) + row.get("target_tokens", 0)
    entries = json.loads((folder / "manifest.json").read_text())
    return {
        "accuracy": {file.stem: json.loads(file.read_text()) for file in sorted((folder / "eval").glob("*.json"))},
        "correct": {path.parent.name: correct(path, held_out) for path in sorted((folder / "eval").glob("*/verified"))},
        "traces": {path.parent.name: traces(path.parent) for path in sorted(folder.glob("round_*/verified"))},
        "rollouts": {path.parts[-3]: traces(path.parent) for path in sorted(folder.glob("round_*/rollouts/verified"))},
        "target_tokens": {stage: count for stage, count in tokens.items() if count},
        "seconds": {stage: entry["seconds"] for stage, entry in entries.items() if entry["status"] == "finished"},
        "weigh": {str(row["step"]): row for row in rows if row["stage"] == "weigh"},
    }


def correct(verified: Path, questions: list[Question]) -> str:
    """Number of correct samples per question, one digit each; a truncated trace has no answer and counts as wrong."""
    counts = dict.fromkeys((question.id for question in questions), 0)
    for answer in read_records(verified / "data.parquet", Answer):
        counts[answer.question_id] += bool(answer.correct)
    return "".join(map(str, counts.values()))


def traces(folder: Path) -> dict[str, float]:
    """Statistics of a round's sampled traces and their answers."""
    sampled = read_records(folder / "traces" / "data.parquet", Trace)
    answers = read_records(folder / "verified" / "data.parquet", Answer)
    distinct = {(trace.question_id, trace.trace_ids.tobytes()) for trace in sampled}
    return {
        "traces": len(sampled),
        "tokens": sum(len(trace.trace_ids) for trace in sampled),
        "truncated": sum(trace.finish != "closed" for trace in sampled),
        "distinct": len(distinct),
        "answers": len(answers),
        "correct_answers": sum(bool(answer.correct) for answer in answers),
    }


async def serve(jobs: list[Job]) -> list[str]:
    """Execute the jobs, one at a time per server; runs load weights into it in place. Returns logs of failed runs."""
    config = load_config(CONFIG, [])
    async with ManagedServers(config.rollout, Path(config.model), RUNS / "servers") as servers:
        os.environ[KEY] = servers.api_key  # for the runs, too
        external = replace(config.rollout, mode="external", urls=servers.urls, api_key_env=KEY)
        async with open_engine(external, Path(config.model), RUNS) as engine:
            await engine.load_weights(Path(config.model))  # marks the servers as ours: runs may replace their weights
        waiting, failed = list(jobs), list[str]()
        with ProgressLine("evidence") as line:
            await asyncio.gather(*(work(url, waiting, failed, len(jobs), line) for url in servers.urls))
    return failed


BUSY: set[tuple[str, int]] = set()
"""Tasks and seeds with a running job. Others of the same task and seed wait, since they may reuse its stages."""


async def work(url: str, waiting: list[Job], failed: list[str], num_jobs: int, line: ProgressLine) -> None:
    """Worker of one server: repeatedly take a job that can start, run it and store its result, until none is left."""
    while waiting:
        job = next((job for job in waiting if (job.task, job.seed) not in BUSY), None)
        if job is None:
            await asyncio.sleep(1)
            continue
        waiting.remove(job)
        BUSY.add((job.task, job.seed))
        folder = RUNS / job.task / f"{job.method}_{job.seed}"
        try:
            await run(job.task, job.seed, job.method, url)
            keep(job, folder)
        except RunFailed as error:
            if collapsed(folder):
                keep(job, folder)
            else:
                failed.append(str(error))
        BUSY.remove((job.task, job.seed))
        line.update(num_jobs - len(waiting) - len(BUSY), num_jobs, f"runs, finished {job.task} {job.method} {job.seed}")


def known_results() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """Task -> method -> seed -> stored result."""
    results: dict[str, dict[str, dict[str, dict[str, object]]]] = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    )
    return results


def keep(job: Job, folder: Path) -> None:
    """Store the result of a run in results.json."""
    known = known_results()
    of_method = known.setdefault(job.task, {}).setdefault(job.method, {})
    measured = result(folder, read_questions(RUNS / f"{job.task}_data" / "eval.jsonl"))
    of_method[str(job.seed)] = {"settings": settings(job.task, job.seed, job.method), **measured}
    with atomic_write(RESULTS) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Run the selected methods, tasks and seeds and store their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("chains", "unknown"), default=["chains", "unknown"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = parser.parse_args()
    for task in chosen.tasks:
        make_data(task)
    known = known_results()
    jobs = [
        Job(task, name, seed)
        for name, task, seed in product(chosen.methods, chosen.tasks, chosen.seeds)
        if known.get(task, {}).get(name, {}).get(str(seed), {}).get("settings") != settings(task, seed, name)
    ]
    failed = asyncio.run(serve(jobs)) if jobs else []
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; see {', '.join(failed)}")
    print(f"{RESULTS}: {len(jobs)} runs added")


if __name__ == "__main__":
    main()
