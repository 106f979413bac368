"""Controlled comparison of the methods (`make evidence`): what runs on which task is in `evidence_tasks.py`.

    python examples/evidence.py [--tasks sort search ...] [--seeds 1 2 ...] [--methods iwae rft ...]

Runs of one task and seed differ only in the settings compared: they reuse each other's stages with the same settings
(`reuse`), so they share pi_0, and where possible q, traces, verdicts and scores. Two runs execute concurrently, each a
single rank with one of two servers, which are started once. Their output goes to runs/evidence/logs. Results are
written to runs/evidence/results.json after each run, so the command is resumable: a run whose result is there with the
same settings is skipped. Copy docs/evidence/results.json there to add to the published ones.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence_tasks import TASKS

from megavar.config.load import load_config
from megavar.data.questions import read_questions
from megavar.disk import atomic_write
from megavar.models.config_json import read_dims
from megavar.models.dims import ModelDims
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
BASE_FLAGS = ("--num-steps", "900", "--row-tokens", "128")
"""Of the bases that are made for the hard tasks."""


@dataclass(frozen=True)
class Job:
    """One run."""

    task: str
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """The run's."""
        return RUNS / self.task / f"{self.method}_{self.seed}"

    @property
    def data(self) -> Path:
        """Folder of its question files."""
        task = TASKS[self.task]
        return RUNS / (f"{self.task}_data_{self.seed}" if task.data_of_seed else f"{self.task}_data")

    @property
    def base(self) -> Path:
        """The base model that is made for its task."""
        return RUNS / f"{TASKS[self.task].corpus}_base"


def make_inputs(job: Job) -> None:
    """Generate the questions and the base of a run if they do not exist."""
    task = TASKS[job.task]
    if task.corpus and not (job.base / "README.md").exists():  # which is written last
        made = ("examples/base/make_base.py", "--out", str(job.base), "--corpus", task.corpus)
        subprocess.run([sys.executable, *made, *BASE_FLAGS], check=True)
    if not (job.data / "made").exists():
        script, *flags = (part.format(seed=job.seed) for part in task.data)
        subprocess.run([sys.executable, script, *flags, "--out", job.data], check=True)
        (job.data / "made").touch()


def settings(job: Job) -> list[str]:
    """Configuration overrides of a run, relative to conf/demo.yaml."""
    task, method = TASKS[job.task], TASKS[job.task].methods[job.method]
    overrides = [
        f"runs_dir={job.folder.parent}",
        f"name={job.folder.name}",
        f"seed={job.seed}",
        *([f"model={job.base}"] if task.corpus else []),
        *(setting.format(data=job.data) for setting in task.overrides),
        *(f"{stage}.num_steps={steps}" for stage, steps in task.steps.items()),
        *(setting.format(data=job.data) for setting in method.overrides),
    ]
    if method.takes_steps:
        overrides.append(f"{method.takes_steps[0]}.num_steps={sum(task.steps[stage] for stage in method.takes_steps)}")
    if not method.evaluates_pi_0:
        overrides.append("eval.models=[policy]")
    return overrides


def others(job: Job) -> list[Path]:
    """Runs of the same task and seed, whose finished stages a run may reuse."""
    runs = (replace(job, method=method).folder for method in TASKS[job.task].methods if method != job.method)
    return [folder for folder in runs if (folder / "manifest.json").exists()]


def collapsed(folder: Path) -> bool:
    """Whether a run failed because no trace of its last round has weight, which is a valid result."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    counts = [row["questions_with_weight"] for row in rows if row["stage"] == "weigh"]
    return bool(counts) and counts[-1] == 0


async def run(job: Job, url: str) -> None:
    """Run one method; finished stages are skipped, and those that another run has finished are linked from there.

    Args:
        url: of the server to use.

    Raises:
        RunFailed: naming the log file.
    """
    reuse = ",".join(map(str, others(job)))
    overrides = [*settings(job), f"reuse=[{reuse}]"]
    overrides += ["rollout.mode=external", f"rollout.urls=[{url}]", f"rollout.api_key_env={KEY}"]
    log = RUNS / "logs" / f"{job.task}_{job.folder.name}.log"
    for stage in ("sft", "eval") if TASKS[job.task].methods[job.method].only_sft else ("run",):
        await launch(stage, overrides, log)


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
    environment["PYTHONPATH"] = os.pathsep.join(["examples/data", *filter(None, [os.environ.get("PYTHONPATH")])])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *guarded, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        if await process.wait():
            raise RunFailed(str(log))


def result(job: Job) -> dict[str, object]:
    """Results of a run: accuracy of every policy, costs by stage, statistics of traces and weights.

    The last stage of a collapsed run has no seconds.
    """
    folder, task = job.folder, TASKS[job.task]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens: dict[str, float] = {}
    for row in rows:
        tokens[row["stage"]] = tokens.get(row["stage"], 0) + row.get("target_tokens", 0)
    entries = json.loads((folder / "manifest.json").read_text())
    measured: dict[str, object] = {
        "accuracy": {file.stem: json.loads(file.read_text()) for file in sorted((folder / "eval").glob("pi_*.json"))},
        "traces": {path.parent.name: traces(path.parent) for path in sorted(folder.glob("round_*/verified"))},
        "rollouts": {path.parts[-3]: traces(path.parent) for path in sorted(folder.glob("round_*/rollouts/verified"))},
        "target_tokens": {stage: count for stage, count in tokens.items() if count},
        "seconds": {stage: entry["seconds"] for stage, entry in entries.items() if entry["status"] == "finished"},
        "weigh": {str(row["step"]): row for row in rows if row["stage"] == "weigh"},
    }
    if task.suites:
        measured["flops"] = flops(folder, rows, read_dims(job.base))
        measured["correct"] = {
            suite: {
                path.parent.name: correct(path, read_questions(job.data / f"{suite}.jsonl"))
                for path in sorted((folder / "eval" / suite).glob("*/verified"))
            }
            for suite in task.suites
        }
    else:
        questions = read_questions(job.data / "eval.jsonl")
        found = {path.parent.name: correct(path, questions) for path in sorted((folder / "eval").glob("*/verified"))}
        measured["correct"] = {model: "".join(map(str, counts)) for model, counts in found.items()}
    return measured


def flops(folder: Path, rows: list[dict[str, Any]], dims: ModelDims) -> dict[str, float]:
    """FLOPs of what a method does, by stage: training as in its metrics; each token sampled or scored once forward.

    A question's prompt counts once for sampling. Scoring counts the policy's and the sampler's forward over prompt and
    trace, where weights compare the two; without a ratio it is not needed.
    """
    spent: dict[str, float] = {}
    for row in rows:
        if "tflops_per_second_per_rank" in row:
            of_step = row["tflops_per_second_per_rank"] * row["seconds"] * 1e12
            spent[row["stage"]] = spent.get(row["stage"], 0.0) + of_step
    for place in sorted(folder.glob("round_*/rollouts/verified")) + sorted(folder.glob("round_*/verified")):
        sampled = read_records(place.parent / "traces" / "data.parquet", Trace)
        prompts = {trace.question_id: len(trace.prompt_ids) for trace in sampled}
        answer_tokens: dict[tuple[str, int], int] = {}
        for answer in read_records(place / "data.parquet", Answer):
            key = answer.question_id, answer.trace_index
            answer_tokens[key] = answer_tokens.get(key, 0) + len(answer.answer_ids)
        total = sum(forward(dims, length, 0) for length in prompts.values())
        scored = 0.0
        for trace in sampled:
            prompt, length = len(trace.prompt_ids), len(trace.trace_ids)
            after = prompt + length + answer_tokens.get((trace.question_id, trace.trace_index), 0)
            total += forward(dims, after, after - prompt) - forward(dims, prompt, 0)
            scored += 2 * forward(dims, prompt + length, length)
        stage = "rollouts" if place.parent.name == "rollouts" else "sample"
        spent[stage] = spent.get(stage, 0.0) + total
        if stage == "sample" and any(trace.sampler == "posterior" for trace in sampled):
            spent["score"] = spent.get("score", 0.0) + scored
    return spent


def forward(dims: ModelDims, length: int, num_targets: int) -> float:
    """FLOPs of a forward pass over a sequence of `length` tokens."""
    return dims.training_flops([length], num_targets) / 3


def correct(verified: Path, questions: list[Question]) -> list[int]:
    """Number of correct samples of each question; a truncated trace has no answer and counts as wrong."""
    counts = dict.fromkeys((question.id for question in questions), 0)
    for answer in read_records(verified / "data.parquet", Answer):
        counts[answer.question_id] += bool(answer.correct)
    return list(counts.values())


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
        try:
            await run(job, url)
            keep(job)
        except RunFailed as error:
            if collapsed(job.folder):
                keep(job)
            else:
                failed.append(str(error))
        BUSY.remove((job.task, job.seed))
        line.update(num_jobs - len(waiting) - len(BUSY), num_jobs, f"runs, finished {job.task} {job.method} {job.seed}")


def known_results() -> dict[str, Any]:
    """Task -> method -> seed -> stored result."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def known_settings(known: Mapping[str, Any], job: Job) -> list[str] | None:
    """Those that the stored result of a run was made with; None if there is none."""
    found: list[str] | None = known.get(job.task, {}).get(job.method, {}).get(str(job.seed), {}).get("settings")
    return found


def keep(job: Job) -> None:
    """Store the result of a run in results.json."""
    known = known_results()
    of_method = known.setdefault(job.task, {}).setdefault(job.method, {})
    of_method[str(job.seed)] = {"settings": settings(job), **result(job)}
    with atomic_write(RESULTS) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Run the selected methods, tasks and seeds and store their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of a task's")
    parser.add_argument("--methods", nargs="+", help="default: all of a task's")
    chosen = parser.parse_args()
    known = known_results()
    jobs = [
        Job(name, method, seed)
        for seed in sorted({seed for name in chosen.tasks for seed in TASKS[name].seeds})
        for name in chosen.tasks
        for method, how in TASKS[name].methods.items()
        if seed in TASKS[name].seeds[: how.num_seeds]
        if seed in (chosen.seeds or [seed]) and method in (chosen.methods or [method])
    ]
    jobs = [job for job in jobs if known_settings(known, job) != settings(job)]
    for job in jobs:
        make_inputs(job)
    failed = asyncio.run(serve(jobs)) if jobs else []
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; see {', '.join(failed)}")
    print(f"{RESULTS}: {len(jobs)} runs added")


if __name__ == "__main__":
    main()
