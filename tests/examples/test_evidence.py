"""Runs of the comparison share exactly the stages they say, and every method is a valid configuration."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from megavar.config.load import load_config
from megavar.record_files import write_records
from megavar.records import Answer, Question, Trace
from megavar.runs.plan import find_stage

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("evidence", ROOT / "examples" / "evidence.py")
evidence = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evidence)


@pytest.fixture
def source(tmp_path):
    """A run whose stages up to `eval` have left a file each."""
    run = tmp_path / "source"
    for stage, folders in evidence.OUTPUTS.items():
        for folder in folders:
            (run / folder).mkdir(parents=True)
            (run / folder / "data").write_text(stage)
    entries = {stage: {"status": "finished", "digest": stage} for stage in evidence.OUTPUTS}
    (run / "manifest.json").write_text(json.dumps(entries))
    rows = [{"stage": stage, "step": 1} for stage in ("sft", "policy", "weigh")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_run_shares_what_came_up_to_a_stage_and_nothing_after_it(source, tmp_path):
    target = tmp_path / "target"
    evidence.share(source, target, "score")
    entries = json.loads((target / "manifest.json").read_text())
    assert list(entries) == ["sft", "rollouts", "posterior", "sample", "verify", "score"]
    files = {str(file.relative_to(target)) for file in target.rglob("data")}
    assert files == {f"{folder}/data" for stage in entries for folder in evidence.OUTPUTS[stage]}
    assert (target / "sft" / "data").samefile(source / "sft" / "data")
    assert [json.loads(row)["stage"] for row in (target / "metrics.jsonl").read_text().splitlines()] == ["sft"]
    (target / "more").write_text("kept")
    evidence.share(source, target, "sft")
    assert (target / "more").exists()


def test_a_question_without_answers_has_none_correct(tmp_path):
    nothing = np.zeros(0, np.int32)
    answers = [
        Answer(name, 0, index, 0, nothing, "", "stop", 0, correct)
        for index, (name, correct) in enumerate([("a", True), ("c", True), ("a", True), ("c", False)])
    ]
    write_records(tmp_path / "data.parquet", answers, Answer)
    assert evidence.correct(tmp_path, [Question(name, "", "") for name in "abc"]) == "201"


def test_a_whole_round_is_shared_with_its_link(source, tmp_path):
    (source / "round_01" / "policy" / "hf").mkdir()
    evidence.share(source, tmp_path / "target", "eval")
    assert (tmp_path / "target" / "hf").resolve() == (tmp_path / "target" / "round_01" / "policy" / "hf").resolve()


@pytest.mark.parametrize("task", evidence.STEPS)
@pytest.mark.parametrize("name", evidence.METHODS)
def test_every_method_is_a_valid_run_and_shares_stages_that_it_has(name, task):
    method = evidence.METHODS[name]
    config = load_config(ROOT / "conf" / "demo.yaml", list(evidence.settings(task, 1, name)))
    if method.shared_with:
        other = load_config(ROOT / "conf" / "demo.yaml", list(evidence.settings(task, 1, method.shared_with)))
        find_stage(other, method.until)  # raises where there is none
        find_stage(config, method.until)
        assert method.until != "eval" or config.eval == other.eval


@pytest.mark.parametrize(("questions", "expected"), [([], False), ([200], False), ([200, 0], True)])
def test_a_run_whose_last_round_has_no_weight_has_collapsed(tmp_path, questions, expected):
    rows = [{"stage": "weigh", "step": step, "questions_with_weight": count} for step, count in enumerate(questions, 1)]
    rows.append({"stage": "posterior_02", "step": 1, "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evidence.collapsed(tmp_path) is expected
    assert not evidence.collapsed(tmp_path / "nothing")


def test_what_a_collapsed_run_measured_is_kept(source, monkeypatch, tmp_path):
    """Its last stage is begun only, and it has no last policy."""
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results.json")
    folder = tmp_path / "chains" / "reverse_kl_rounds_3_1"
    source.rename(folder.parent.mkdir() or folder)
    entries = {"weigh": {"status": "finished", "seconds": 1.5}, "policy_02": {"status": "begun"}}
    (folder / "manifest.json").write_text(json.dumps(entries))
    for place in ("traces", "verified"):
        (folder / "round_01" / place / "data").unlink()
    write_records(folder / "round_01" / "traces" / "data.parquet", [], Trace)
    write_records(folder / "round_01" / "verified" / "data.parquet", [], Answer)
    (tmp_path / "chains_data").mkdir()
    (tmp_path / "chains_data" / "eval.jsonl").write_text('{"id": "a", "question": "1", "answer": "1"}')
    job = evidence.Job("chains", "reverse_kl_rounds_3", 1)
    evidence.keep(job, folder)
    kept = evidence.known_results()["chains"]["reverse_kl_rounds_3"]["1"]
    assert kept["seconds"] == {"weigh": 1.5} and kept["traces"]["round_01"]["traces"] == 0
    assert kept["settings"] == evidence.settings("chains", 1, "reverse_kl_rounds_3")


def test_the_committed_results_are_those_of_the_methods_as_they_are():
    """Every task, method and seed, made with the settings that a run would have now."""
    results = json.loads((ROOT / "docs" / "evidence" / "results.json").read_text())
    assert list(results) == list(evidence.STEPS)
    for task, methods in results.items():
        assert list(methods) == list(evidence.METHODS)
        for method, seeds in methods.items():
            assert {seed: found["settings"] for seed, found in seeds.items()} == {
                str(seed): evidence.settings(task, seed, method) for seed in (1, 2, 3)
            }


def test_steps_of_what_a_method_does_without_are_taken_by_another_stage():
    assert "sft.num_steps=168" in evidence.settings("chains", 1, "more_sft")  # 52 + 52 + 64
    assert "policy.train.num_steps=220" in evidence.settings("unknown", 1, "rft_more_steps")  # 100 + 120
