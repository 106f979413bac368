"""Every method is a valid configuration, runs share the stages they can, and costs are what was computed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megavar.config.load import load_config
from megavar.models.config_json import read_dims
from megavar.record_files import write_records
from megavar.records import Answer, Question, Trace
from megavar.runs.plan import stages_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # where it looks for the rest of it, as a script
SPEC = importlib.util.spec_from_file_location("evidence", ROOT / "examples" / "evidence.py")
evidence = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evidence)
Job, TASKS = evidence.Job, evidence.TASKS
JOBS = [Job(task, method, seed) for task in TASKS for method in TASKS[task].methods for seed in TASKS[task].seeds[:1]]


def config_of(job):
    return load_config(ROOT / "conf" / "demo.yaml", evidence.settings(job))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.folder.name + job.task)
def test_every_method_is_a_valid_run_of_its_own(job):
    config = config_of(job)
    assert config.seed == job.seed and config.name == job.folder.name
    assert [stage.name for stage, _ in stages_of(config)][-1] == "eval"
    assert ("pi_0" in config.eval.models) is TASKS[job.task].methods[job.method].evaluates_pi_0


def test_a_run_may_reuse_the_others_of_its_task_and_seed_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    for task, method, seed in (("sort", "iwae", 1), ("sort", "rft", 1), ("sort", "iwae", 2), ("search", "iwae", 1)):
        folder = Job(task, method, seed).folder
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert evidence.others(Job("sort", "rft", 1)) == [Job("sort", "iwae", 1).folder]


def test_a_question_without_answers_has_none_correct(tmp_path):
    nothing = np.zeros(0, np.int32)
    answers = [
        Answer(name, 0, index, 0, nothing, "", "stop", 0, correct)
        for index, (name, correct) in enumerate([("a", True), ("c", True), ("a", True), ("c", False)])
    ]
    write_records(tmp_path / "data.parquet", answers, Answer)
    assert evidence.correct(tmp_path, [Question(name, "", "") for name in "abc"]) == [2, 0, 1]


def test_flops_count_each_token_once_forward_and_thrice_where_it_trains(tmp_path):
    dims = read_dims(ROOT / "examples" / "base" / "qwen3-tiny")
    ids = np.arange(10, dtype=np.int32)
    traces = [Trace("a", k, 1, "posterior", ids[:4], ids[:3], None, "closed", 0) for k in (0, 1)]
    answers = [Answer("a", 0, n, 0, ids[:2], "", "stop", 0, True) for n in (0, 1)]
    for place, records, kind in (("traces", traces, Trace), ("verified", answers, Answer)):
        write_records(tmp_path / "round_01" / place / "data.parquet", records, kind)
    step = {"stage": "sft", "tflops_per_second_per_rank": 2.0, "seconds": 0.5}
    spent = evidence.flops(tmp_path, [step, step, {"stage": "weigh"}], dims)

    def forward(*lengths, targets):  # by hand, of the layers' shapes
        layer = 128 * (2 * 8 * 32 + 2 * 4 * 32) + 3 * 128 * 384
        return sum(2 * 4 * layer * n + 2 * 4 * 8 * 32 * n**2 for n in lengths) + 2 * 128 * 512 * targets

    prompt = forward(4, targets=0)
    assert spent == {
        "sft": 2e12,
        "sample": pytest.approx(prompt + forward(11, 7, targets=10) - 2 * prompt),
        "score": pytest.approx(2 * forward(7, 7, targets=6)),
    }


@pytest.mark.parametrize(("questions", "expected"), [([], False), ([200], False), ([200, 0], True)])
def test_a_run_whose_last_round_has_no_weight_has_collapsed(tmp_path, questions, expected):
    rows = [{"stage": "weigh", "step": step, "questions_with_weight": count} for step, count in enumerate(questions, 1)]
    rows.append({"stage": "posterior_02", "step": 1, "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evidence.collapsed(tmp_path) is expected
    assert not evidence.collapsed(tmp_path / "nothing")


def test_what_a_collapsed_run_measured_is_kept(monkeypatch, tmp_path):
    """Its last stage is begun only, and it has no last policy."""
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results.json")
    job = Job("chains", "reverse_kl_rounds_3", 1)
    entries = {"weigh": {"status": "finished", "seconds": 1.5}, "policy_02": {"status": "begun"}}
    for place, kind in (("traces", Trace), ("verified", Answer)):
        write_records(job.folder / "round_01" / place / "data.parquet", [], kind)
    (job.folder / "manifest.json").write_text(json.dumps(entries))
    (job.folder / "metrics.jsonl").write_text(json.dumps({"stage": "weigh", "step": 1}) + "\n")
    job.data.mkdir()
    (job.data / "eval.jsonl").write_text('{"id": "a", "question": "1", "answer": "1"}')
    evidence.keep(job)
    kept = evidence.known_results()["chains"]["reverse_kl_rounds_3"]["1"]
    assert kept["seconds"] == {"weigh": 1.5} and kept["traces"]["round_01"]["traces"] == 0
    assert kept["settings"] == evidence.settings(job)


def test_the_committed_results_are_those_of_the_methods_as_they_are():
    """Made with the settings that a run would have now; the easy tasks with every method and seed."""
    results = json.loads((ROOT / "docs" / "evidence" / "results.json").read_text())
    for task, methods in results.items():
        for method, seeds in methods.items():
            for seed, found in seeds.items():
                assert found["settings"] == evidence.settings(Job(task, method, int(seed)))
    for task in ("chains", "unknown"):
        assert {method: sorted(results[task][method]) for method in results[task]} == {
            method: ["1", "2", "3"] for method in TASKS[task].methods
        }


def test_steps_of_what_a_method_does_without_are_taken_by_another_stage():
    assert "sft.num_steps=168" in evidence.settings(Job("chains", "more_sft", 1))  # 52 + 52 + 64
    assert "policy.train.num_steps=220" in evidence.settings(Job("unknown", "rft_more_steps", 1))  # 100 + 120
