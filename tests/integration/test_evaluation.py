"""`megavar eval` without a run, for real: two models, two suites, killed and stopped on the way, and resumed."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megavar.config.load import load_evaluation
from megavar.evaluation.results import read_results
from megavar.record_files import read_records
from megavar.records import Answer, Trace
from megavar.rollout.sglang_servers import ManagedServers
from megavar.runs.manifest import Manifest

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
NUM_SAMPLES, SIZES = 3, {"sums": 16, "products": 6}
SECONDS = 600
"""Limit of a wait, most of which is the start of a server; of seconds on an idle machine."""
SETTINGS = [
    f"rollout.python={ROOT}/.venv-sglang/bin/python", "rollout.dtype=float32", "rollout.max_total_tokens=4096",
    "rollout.context_length=256", "rollout.concurrency=4", "sample.max_trace_tokens=60", "sample.max_answer_tokens=12",
    "sample.flush_seconds=0.1", "eval.num_bootstrap=200",
]  # fmt: skip
KEY = "KEY_OF_THE_SERVERS"


class Evaluation:
    """The command, and what it has on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.models = [BASE, folder / "other"]
        shutil.copytree(BASE, self.models[1])
        weights = self.models[1] / "model.safetensors"
        save_file({name: 0.9 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        for name, size in SIZES.items():
            sign = "+" if name == "sums" else "*"
            rows = [
                {"id": f"q{n:02}", "question": f"{n % 10}{sign}{n // 10} left to right mod 10", "answer": str(n % 10)}
                for n in range(size)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        models = [part for model in self.models for part in ("--model", str(model))]
        suites = ["--suite", *(str(self.folder / f"{name}.jsonl") for name in SIZES)]
        command = [sys.executable, "-m", "megavar", "eval", "--out", str(self.out), *models, *suites]
        command += ["--samples", str(NUM_SAMPLES), *SETTINGS, *more]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env={**os.environ, KEY: "secret"}, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def traces(self, name: str) -> dict[tuple[str, int], list[int]]:
        """The sampled ids of a model and a suite, in parts or merged."""
        files = [
            *(self.out / name / "traces").glob("part-*.parquet"),
            *(self.out / name / "traces").glob("data.parquet"),
        ]
        rows = [row for file in files for row in read_records(file, Trace)]
        return {(row.question_id, row.trace_index): row.trace_ids.tolist() for row in rows}

    def wait_for_some(self, name: str, process: subprocess.Popen[bytes]) -> dict[tuple[str, int], list[int]]:
        """Until some traces of a model and a suite are on disk; returns those."""
        limit = time.monotonic() + SECONDS
        while not list((self.out / name / "traces").glob("part-*.parquet")):
            assert process.poll() is None and time.monotonic() < limit, self.log()[-3000:]
            time.sleep(0.02)
        return self.traces(name)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Killed while the first model samples, stopped while the second does, then finished."""
    found = Evaluation(tmp_path_factory.mktemp("evaluation"))
    killed = found.start()
    found.wait_for_some("sums/qwen3-tiny", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    found.before = {"sums/qwen3-tiny": found.traces("sums/qwen3-tiny")}
    stopped = found.start()
    found.wait_for_some("sums/other", stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 75, found.log()[-3000:]
    found.before["sums/other"] = found.traces("sums/other")
    found.settled = os.stat(found.out / "products" / "qwen3-tiny" / "traces" / "data.parquet").st_mtime_ns
    assert found.start().wait(2 * SECONDS) == 0, found.log()[-3000:]
    return found


def test_nothing_is_sampled_twice_and_every_sample_is_there_once(evaluation):
    for name, size in SIZES.items():
        for model in ("qwen3-tiny", "other"):
            folder = evaluation.out / name / model
            traces = read_records(folder / "traces" / "data.parquet", Trace)
            keys = [(trace.question_id, trace.trace_index) for trace in traces]
            assert keys == sorted(set(keys)) and len(keys) == size * NUM_SAMPLES
            closed = [key for key, trace in zip(keys, traces, strict=True) if trace.finish == "closed"]
            answers = read_records(folder / "verified" / "data.parquet", Answer)
            assert [(row.question_id, row.trace_index) for row in answers] == closed
            assert all(row.verdict in ("correct", "wrong", "no_answer") for row in answers)
    for name, before in evaluation.before.items():
        after = evaluation.traces(name)
        assert 0 < len(before) < SIZES["sums"] * NUM_SAMPLES, name  # else it was interrupted too early or too late
        assert {key: after[key] for key in before} == before, name
    finished = evaluation.out / "products" / "qwen3-tiny" / "traces" / "data.parquet"
    assert os.stat(finished).st_mtime_ns == evaluation.settled


def test_results_are_what_the_records_say(evaluation):
    results = read_results(evaluation.out / "results.json")
    assert list(results.suites) == [*SIZES] and list(results.models) == ["qwen3-tiny", "other"]
    for name, suite in results.suites.items():
        assert suite.questions == SIZES[name]
        means = {}
        for model, values in suite.models.items():
            folder = evaluation.out / name / model
            traces = read_records(folder / "traces" / "data.parquet", Trace)
            answers = read_records(folder / "verified" / "data.parquet", Answer)
            num_samples = SIZES[name] * NUM_SAMPLES
            means[model] = sum(answer.correct for answer in answers) / num_samples
            tokens = sum(len(trace.trace_ids) for trace in traces) + sum(len(answer.answer_ids) for answer in answers)
            cut = sum(row.finish == "length" for row in (*traces, *answers))
            passed = len({answer.question_id for answer in answers if answer.correct}) / SIZES[name]
            expected = {f"avg@{NUM_SAMPLES}": means[model], f"pass@{NUM_SAMPLES}": passed,
                        "tokens": tokens / num_samples, "truncated": cut / num_samples}  # fmt: skip
            assert {metric: values[metric].mean for metric in expected} == pytest.approx(expected, rel=1e-12)
            assert all(value.low <= value.mean <= value.high for value in values.values())
        (difference,) = suite.differences
        found = difference.values[f"avg@{NUM_SAMPLES}"].mean
        assert found == pytest.approx(means["other"] - means["qwen3-tiny"], abs=1e-12)


def test_a_rerun_only_reads_and_other_settings_are_refused(evaluation):
    manifest = Manifest(evaluation.out)
    assert {entry["status"] for entry in manifest.entries().values()} == {"finished"} and len(manifest.entries()) == 4
    before = manifest.file.read_text()
    assert evaluation.start().wait(SECONDS) == 0
    assert evaluation.log().count(": finished, skipped") >= 4 + 2 and manifest.file.read_text() == before
    assert evaluation.start("sample.temperature=0.1").wait(SECONDS) == 2
    refusal = evaluation.log().splitlines()[-1]
    assert "stage sums/qwen3-tiny was finished with sample.temperature=0.7, now it is 0.1;" in refusal
    assert not (evaluation.out / "owner.json").exists()


def test_the_table_and_the_page_show_every_model_on_every_suite(evaluation):
    printed = evaluation.log()
    for name, size in SIZES.items():
        assert f"{name}, {size} questions" in printed
    assert "other − qwen3-tiny" in printed
    report = [sys.executable, "-m", "megavar", "report", str(evaluation.out)]
    assert subprocess.run(report, cwd=ROOT, capture_output=True).returncode == 0
    page = (evaluation.out / "report" / "index.html").read_text()
    assert all(f'<th colspan="6">{name}, {size} questions</th>' in page for name, size in SIZES.items())
    assert page.count("<td>other − qwen3-tiny</td>") == 2 and page.count("<img ") == 1 and "<script" not in page
    assert (evaluation.out / "report" / "suites.png").stat().st_size > 1000


def test_external_servers_are_given_the_weights_of_each_model(tmp_path, monkeypatch):
    """Greedy traces are those of transformers with each model, whatever the servers were left with."""
    found = Evaluation(tmp_path)
    managed = load_evaluation(None, SETTINGS).rollout
    monkeypatch.setattr(secrets, "token_urlsafe", lambda _: "secret")
    external = ["rollout.mode=external", f"rollout.api_key_env={KEY}", "sample.temperature=0"]

    async def evaluate_twice() -> list[int]:
        async with ManagedServers(replace(managed, start_timeout_seconds=SECONDS), BASE, tmp_path) as servers:
            command = [*external, f"rollout.urls=[{servers.urls[0]}]"]
            codes = [await asyncio.to_thread(found.start(*command).wait)]
            found.out.rename(tmp_path / "first")
            return [*codes, await asyncio.to_thread(found.start(*command).wait)]

    assert asyncio.run(evaluate_twice()) == [0, 0], found.log()[-3000:]
    for name, folder in zip(("qwen3-tiny", "other"), found.models, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for out in (found.out, tmp_path / "first"):
            traces = read_records(out / "products" / name / "traces" / "data.parquet", Trace)
            for trace in traces[::NUM_SAMPLES]:
                prompt = torch.tensor(trace.prompt_ids.tolist())[None]
                with torch.no_grad():
                    ids = model.generate(prompt, max_new_tokens=len(trace.trace_ids), do_sample=False)
                assert ids[0, prompt.shape[1] :].tolist() == trace.trace_ids.tolist()
    one, other = (found.traces(f"products/{name}") for name in ("qwen3-tiny", "other"))
    differing = sum(one[key] != other[key] for key in one)
    assert differing  # else nothing shows which weights were served
