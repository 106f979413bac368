"""The main job for real: two rounds under torchrun on real SGLang servers, killed three times, and its results."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.commands import megavar
from helpers.ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from megavar.checkpoints.convert import Model
from megavar.config.load import load_config
from megavar.record_files import read_records
from megavar.records import Answer, Score, Trace, Weight
from megavar.rollout.engine import GenerateRequest
from megavar.rollout.sglang_servers import ManagedServers, open_engine
from megavar.runs.metrics import Metrics

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).parents[2]
NUM_QUESTIONS, NUM_TRACES, NUM_ANSWERS, NUM_ROLLOUTS = 24, 4, 2, 5
GRID = ["parallel.tensor=2", "parallel.pipeline=2"]


def config_of(folder: Path) -> str:
    return f"""
name: job
runs_dir: {folder}
model: {ROOT}/examples/base/qwen3-tiny
data: {{train: {folder}/data/train.jsonl, eval: {folder}/data/eval.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
rollout: {{python: {ROOT}/.venv-sglang/bin/python, dtype: float32, max_total_tokens: 8192, context_length: 256,
           concurrency: 8}}
sft: &train {{epochs: 10, batch_sequences: 16, microbatch_tokens: 1024, learning_rate: 2.0e-3, save_interval: 5}}
posterior: {{source: rollout, num_rollouts: {NUM_ROLLOUTS}, train: {{<<: *train, epochs: 1}}}}
sample: {{num_traces: {NUM_TRACES}, num_answers: {NUM_ANSWERS}, max_trace_tokens: 80, max_answer_tokens: 16,
          temperature: 0.7, flush_seconds: 0.1}}
score: {{temperature: 0.7, microbatch_tokens: 2048, chunk_sequences: 30}}
objective: {{num_traces: {NUM_TRACES}, on_no_correct_trace: gold}}
policy: {{mix_gold: true, train: {{<<: *train, epochs: 3, save_interval: 3}}}}
eval: {{num_samples: 2}}
"""


def start(folder: Path, ranks: int, *arguments: str) -> subprocess.Popen:
    log = (folder / "log.txt").open("a")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    job = ["examples/pretrain_variational.py", "--config", str(folder / "run.yaml")]
    return subprocess.Popen(
        [*torchrun, *job, *arguments],
        cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def kill_when(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """SIGKILL to torchrun and all it started, at the moment `ready` holds."""
    for _ in range(30_000):
        if ready():
            break
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.01)
    else:
        pytest.fail("the moment never came")
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)
    process.wait()


def status(run: Path, stage: str) -> str | None:
    file = run / "manifest.json"
    return json.loads(file.read_text()).get(stage, {}).get("status") if file.exists() else None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: dict) -> list[int]:
    """What the policy is asked, made without megavar's templates."""
    messages = [{"role": "user", "content": row["question"]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + "<think>\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def modified(folder: Path, *patterns: str) -> dict[Path, int]:
    """Files and the times of their last change."""
    return {file: file.stat().st_mtime_ns for pattern in patterns for file in folder.rglob(pattern)}


@dataclass
class Job:
    folder: Path
    run: Path
    partial: list[Trace]
    """On disk when the first start was killed."""
    first_round: dict[Path, int]
    """Its weights, before the second round began."""
    server: list[str]
    """Overrides that name the server of the last two starts."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run of two rounds, killed while sampling, exporting and training; the last two starts find a server running.

    The first two have one round and two ranks, and servers of their own.
    """
    folder = tmp_path_factory.mktemp("job")
    subprocess.run(
        [sys.executable, "examples/data/generate.py", "--out", folder / "data",
         "--num-train", str(NUM_QUESTIONS), "--num-eval", "10"], cwd=ROOT, check=True,
    )  # fmt: skip
    (folder / "run.yaml").write_text(config_of(folder))
    run = folder / "job"
    traces, checkpoints = run / "round_01" / "traces", run / "round_02" / "policy" / "checkpoints"

    kill_when(start(folder, 2), lambda: len(list(traces.glob("part-*"))) >= 2)
    partial = [row for part in traces.glob("part-*") for row in read_records(part, Trace)]
    assert 0 < len(partial) < NUM_QUESTIONS * NUM_TRACES

    config = load_config(folder / "run.yaml", [])
    servers = ManagedServers(config.rollout, run / "sft" / "hf", folder / "servers")
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        try:
            servers.spawn()
            kill_when(start(folder, 2), lambda: status(run, "policy") == "finished")  # export is next, and quick
            if (run / "hf").exists():
                Model(run / "hf")  # complete, or this raises
            first_round = modified(run / "round_01", "*.safetensors")

            runner.run(servers.__aenter__())
            key = "KEY_OF_SERVERS"
            patch.setenv(key, servers.api_key)
            server = ["rollout.mode=external", f"rollout.urls=[{servers.urls[0]}]", f"rollout.api_key_env={key}"]
            command = ["--tp", "2", "--pp", "2", "rounds=2", *server]
            kill_when(start(folder, 4, *command), lambda: bool(list(checkpoints.glob("step_*"))))
            assert status(run, "policy_02") == "begun"
            assert start(folder, 4, *command).wait(timeout=600) == 0, (folder / "log.txt").read_text()[-4000:]
            yield Job(folder, run, partial, first_round, server)
        finally:
            runner.run(servers.stop())


def test_no_trace_is_lost_or_doubled_and_those_sampled_before_the_kill_are_kept(job):
    run, partial = job.run, job.partial
    traces = read_records(run / "round_01" / "traces" / "data.parquet", Trace)
    found = {(trace.question_id, trace.trace_index): trace for trace in traces}
    assert len(found) == len(traces) == NUM_QUESTIONS * NUM_TRACES
    for trace in partial:
        kept = found[trace.question_id, trace.trace_index]
        assert kept.trace_ids.tolist() == trace.trace_ids.tolist() and kept.seed == trace.seed
    assert len({trace.seed for trace in traces}) == len(traces)


def test_every_closed_trace_has_its_answers_verdicts_scores_and_weight(job):
    run = job.run
    traces = read_records(run / "round_01" / "traces" / "data.parquet", Trace)
    closed = {(trace.question_id, trace.trace_index) for trace in traces if trace.finish == "closed"}
    answers = read_records(run / "round_01" / "verified" / "data.parquet", Answer)
    assert {(row.question_id, row.trace_index, row.answer_index) for row in answers} == {
        (*key, index) for key in closed for index in range(NUM_ANSWERS)
    }
    assert all(row.verdict in ("correct", "wrong", "no_answer") for row in answers)
    scores = read_records(run / "round_01" / "scores" / "data.parquet", Score)
    assert len(scores) == len(traces)
    weights = read_records(run / "round_01" / "weights" / "data.parquet", Weight)
    totals: dict[str, float] = {}
    for row in weights:
        totals[row.question_id] = totals.get(row.question_id, 0.0) + row.weight
    assert totals.keys() == {trace.question_id for trace in traces}
    assert all(total == pytest.approx(1.0) for total in totals.values())


def test_every_rollout_is_weighed_by_its_accuracy_also_those_beyond_the_traces_of_q(job):
    """Equation 9: the posterior's weights are the shares of a question's correct answers."""
    run = job.run
    folder = run / "round_01" / "rollouts"
    traces = read_records(folder / "traces" / "data.parquet", Trace)
    assert {trace.trace_index for trace in traces} == set(range(NUM_ROLLOUTS)) and NUM_ROLLOUTS > NUM_TRACES
    correct: dict[tuple[str, int], int] = {}
    for row in read_records(folder / "verified" / "data.parquet", Answer):
        key = row.question_id, row.trace_index
        correct[key] = correct.get(key, 0) + bool(row.correct)
    weights = {
        (row.question_id, row.trace_index): row.weight
        for row in read_records(folder / "weights" / "data.parquet", Weight)
    }
    assert weights.keys() == {(trace.question_id, trace.trace_index) for trace in traces}
    totals = {question: sum(n for (of, _), n in correct.items() if of == question) for question, _ in weights}
    for (question, index), weight in weights.items():
        expected = correct.get((question, index), 0) / totals[question] if totals[question] else 0.0
        assert weight == pytest.approx(expected, abs=1e-9)
    assert any(weight > 0 for (_, index), weight in weights.items() if index >= NUM_TRACES)


def test_the_serving_engine_and_the_training_engine_agree_on_the_posteriors_log_probs(job):
    run = job.run
    rows = [row for row in Metrics.read(run) if row["stage"] == "weigh"]
    assert len(rows) == 2 and all(row["largest_engine_difference"] < 1e-4 for row in rows)


def test_scores_equal_transformers_under_both_prompts(job):
    run = job.run
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for name, folder in (("policy", run / "sft" / "hf"), ("posterior", run / "round_01" / "posterior" / "hf"))
    }
    tokenizer = AutoTokenizer.from_pretrained(run / "sft" / "hf")
    traces = read_records(run / "round_01" / "traces" / "data.parquet", Trace)
    scores = {(row.question_id, row.trace_index): row
              for row in read_records(run / "round_01" / "scores" / "data.parquet", Score)}  # fmt: skip
    closed = [trace for trace in traces if trace.finish == "closed"][:20]
    assert len(closed) == 20
    for trace in closed:
        prompt = tokenizer.decode(trace.prompt_ids)
        without_hint = prompt.replace(prompt[prompt.index("\n\nHint:") : prompt.index("<|im_end|>")], "")
        score = scores[trace.question_id, trace.trace_index]
        for name, text, logps in (
            ("policy", without_hint, score.logp_policy), ("posterior", prompt, score.logp_posterior),
        ):  # fmt: skip
            start_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*start_ids, *trace.trace_ids.tolist()]])
            with torch.no_grad():
                expected = (models[name](ids).logits[0] / 0.7).log_softmax(-1)
            rows = expected[len(start_ids) - 1 : -1].gather(1, ids[0, len(start_ids) :, None]).squeeze(1)
            assert (rows - torch.from_numpy(logps)).abs().max() < 2e-5, name


def test_the_exported_policy_loads_with_no_missing_or_unexpected_key(job):
    run = job.run
    model, info = AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert AutoTokenizer.from_pretrained(run / "hf").chat_template
    assert model.generation_config.eos_token_id is not None
    assert not list(run.rglob(".*tmp"))


def test_the_killed_training_has_exactly_the_losses_of_one_that_was_not(job):
    killed = [row["loss"] for row in Metrics.read(job.run) if row["stage"] == "policy_02"]
    again = job.folder / "again"
    shutil.copytree(job.run, again, symlinks=True)
    shutil.rmtree(again / "round_02" / "policy")
    manifest = json.loads((again / "manifest.json").read_text())
    del manifest["policy_02"]
    (again / "manifest.json").write_text(json.dumps(manifest))
    command = ["policy_02", "--config", str(job.folder / "run.yaml"), "name=again", "rounds=2", *GRID]
    run_ranks(4, megavar, job.folder / "again.txt", True, *command)
    straight = [row["loss"] for row in Metrics.read(again) if row["stage"] == "policy_02"]
    assert len(straight) > 6 and killed == straight


def test_a_finished_run_starts_nothing_and_other_settings_are_refused(job):
    before = modified(job.run, "*.safetensors", "*.log", "data.parquet")
    command = ["run", "--config", str(job.folder / "run.yaml"), "rounds=2", *GRID]
    run_ranks(4, megavar, job.folder / "finished.txt", True, *command)
    printed = (job.folder / "finished.txt").read_text()
    assert printed.count(": finished, skipped\n") == len(json.loads((job.run / "manifest.json").read_text()))
    run_ranks(4, megavar, job.folder / "refused.txt", False, *command, "sft.learning_rate=1e-4")
    assert "sft.learning_rate=0.002, now it is 0.0001" in (job.folder / "refused.txt").read_text()
    assert modified(job.run, "*.safetensors", "*.log", "data.parquet") == before


def test_the_run_ends_with_its_table(job):
    run = job.run
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["traces_sampled"] == NUM_QUESTIONS * NUM_TRACES and 0 < summary["ess"] <= NUM_TRACES
    assert list(summary["accuracy"]) == ["pi_0", "pi_1", "pi_2"]
    for pass_1, pass_2 in summary["accuracy"].values():
        assert 0 <= pass_1["low"] <= pass_1["mean"] <= pass_1["high"] <= 1 and pass_2["mean"] >= pass_1["mean"]


def test_sglangs_greedy_output_of_the_exported_policy_equals_transformers(job):
    """Token by token; the largest difference of a log-prob is printed."""
    config = load_config(job.folder / "run.yaml", job.server)
    tokenizer = AutoTokenizer.from_pretrained(job.run / "hf")
    model = AutoModelForCausalLM.from_pretrained(job.run / "hf", dtype=torch.float32).eval()
    prompts = [prompt_ids(tokenizer, row) for row in read_rows(job.folder / "data" / "eval.jsonl")]

    async def serve() -> list:
        async with open_engine(config.rollout, job.run / "hf", job.folder) as engine:
            return [(await engine.generate(GenerateRequest(ids, max_tokens=60, temperature=0)))[0] for ids in prompts]

    largest = 0.0
    for ids, generation in zip(prompts, asyncio.run(serve()), strict=True):
        start_ids = torch.tensor([ids])
        with torch.no_grad():
            expected = model.generate(start_ids, max_new_tokens=60, do_sample=False)[0, len(ids) :]
            logps = model(torch.cat([start_ids[0], expected])[None]).logits[0].log_softmax(-1)
        assert generation.ids.tolist() == expected.tolist()
        rows_of = logps[len(ids) - 1 : -1].gather(1, expected[:, None]).squeeze(1).numpy()
        largest = max(largest, float(np.abs(rows_of - generation.logps).max()))
    print(f"largest difference of a log-prob: {largest:.1e}")
    assert largest < 1e-4


def test_a_second_round_starts_from_the_first_ones_policy_and_leaves_the_first(job):
    run = job.run
    now = modified(run / "round_01", "*.safetensors")
    assert job.first_round and job.first_round.items() <= now.items()
    assert (run / "hf").resolve() == (run / "round_02" / "policy" / "hf").resolve()
    entries = json.loads((run / "manifest.json").read_text())
    for stage in ("rollouts_02", "sample_02"):
        assert entries[stage]["settings"]["reference"] == entries["export"]["digest"]
    for stage in ("policy", "policy_02"):
        steps = [row["step"] for row in Metrics.read(run) if row["stage"] == stage]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 6
    first, second = (read_records(run / name / "traces" / "data.parquet", Trace) for name in ("round_01", "round_02"))
    assert {row.round for row in second} == {2} and len(second) == len(first)
    assert {row.seed for row in first}.isdisjoint(row.seed for row in second)
    for stage, steps in (("weigh", [1, 2]), ("rollouts", [1, 2]), ("eval", [0, 1, 2])):
        assert [row["step"] for row in Metrics.read(run) if row["stage"] == stage] == steps
    (row,) = [row for row in Metrics.read(run) if (row["stage"], row["step"]) == ("eval", 2)]
    assert row["pass@1"] == json.loads((run / "eval" / "pi_2.json").read_text())[0]["mean"]


def test_the_second_rounds_scores_are_of_the_first_rounds_policy(job):
    run = job.run
    model = AutoModelForCausalLM.from_pretrained(run / "round_01" / "policy" / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    questions = {row["id"]: row for row in read_rows(job.folder / "data" / "train.jsonl")}
    scores = read_records(run / "round_02" / "scores" / "data.parquet", Score)
    score_of = {(row.question_id, row.trace_index): row for row in scores}
    traces = read_records(run / "round_02" / "traces" / "data.parquet", Trace)
    closed = [row for row in traces if row.finish == "closed"][:5]
    assert len(closed) == 5
    for trace in closed:
        ids = prompt_ids(tokenizer, questions[trace.question_id])
        whole = torch.tensor([*ids, *trace.trace_ids.tolist()])
        with torch.no_grad():
            logps = (model(whole[None]).logits[0] / 0.7).log_softmax(-1)[len(ids) - 1 : -1]
        expected = logps.gather(1, whole[len(ids) :, None]).squeeze(1)
        given = torch.from_numpy(score_of[trace.question_id, trace.trace_index].logp_policy)
        assert (given - expected).abs().max() <= 2e-5
