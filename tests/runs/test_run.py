"""The manifest skips what is finished, refuses what changed, and metrics survive a restart."""

import contextlib
import json

import pytest

from megavar.config.load import load_config
from megavar.config.schema import LoggingConfig, TrainConfig
from megavar.evaluation.pass_at_k import accuracy, pass_at_k
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, flat
from megavar.runs.metrics import Metrics
from megavar.stages.runner import run_once
from megavar.stages.sample import derive_seed


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.yaml").write_text(f"name: a\nruns_dir: {tmp_path}\nmodel: m\ndata: {{train: t.jsonl}}\n")
    found = Run(load_config(tmp_path / "run.yaml", []))
    found.open()
    return found


def test_a_finished_stage_is_skipped_and_an_interrupted_one_repeated(run):
    calls = []
    with pytest.raises(RuntimeError):
        run_once(run, "sample", {"k": 1}, lambda: (_ for _ in ()).throw(RuntimeError))
    assert Manifest(run.folder).entries()["sample"]["status"] == "begun"
    for _ in range(2):
        run_once(run, "sample", {"k": 1}, lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_key_and_nothing_runs(run, finished):
    def work():
        if not finished:
            raise RuntimeError

    with contextlib.suppress(RuntimeError):
        run_once(run, "sample", {"k": 1, "x": 0}, work)
    with pytest.raises(ValueError, match=r"stage sample was (begun|finished) with k=1, now it is 2"):
        run_once(run, "sample", {"k": 2, "x": 0}, lambda: pytest.fail("ran"))


def test_a_stage_before_its_input_says_which_is_missing(run):
    with pytest.raises(ValueError, match="stage weigh is not finished; run `megavar weigh` first"):
        Manifest(run.folder).digest("weigh")


def test_stages_downstream_of_a_rerun_one_are_refused(run):
    manifest = Manifest(run.folder)
    run_once(run, "sample", {"k": 1}, lambda: None)
    run_once(run, "verify", {"sample": manifest.digest("sample")}, lambda: None)
    entries = manifest.entries()
    del entries["sample"]
    manifest.file.write_text(json.dumps(entries))
    run_once(run, "sample", {"k": 1}, lambda: None)
    with pytest.raises(ValueError, match="stage verify was finished with sample="):
        run_once(run, "verify", {"sample": manifest.digest("sample")}, lambda: pytest.fail("ran"))


def test_intervals_and_microbatches_may_change_between_restarts():
    assert flat("t", TrainConfig(save_interval=7, microbatch_tokens=99)) == flat("t", TrainConfig(log_interval=3))
    assert flat("t", TrainConfig(learning_rate=7)) != flat("t", TrainConfig())


def test_metrics_of_repeated_steps_replace_the_old_ones_and_a_cut_line_is_left_out(tmp_path):
    metrics = Metrics(tmp_path, LoggingConfig(tensorboard=False), "a")
    for step in range(1, 6):
        metrics.log("policy", step, {"loss": float(step)})
    metrics.log("sft", 4, {"loss": 0.0})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"stage": "policy", "st')
    metrics.drop("policy", range(4, 7))
    assert [(row["stage"], row["step"]) for row in Metrics.read(tmp_path)] == [
        ("policy", 1), ("policy", 2), ("policy", 3), ("sft", 4)]  # fmt: skip
    metrics.drop("policy", [2])
    assert [row["step"] for row in Metrics.read(tmp_path) if row["stage"] == "policy"] == [1, 3]


def test_tensorboard_gets_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, LoggingConfig(tensorboard=True), "a")
    metrics.log("sft", 3, {"loss": 0.25})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("sft/loss")
    assert (event.step, event.value) == (3, 0.25)


def test_seeds_differ_for_every_sample_and_repeat():
    seeds = {derive_seed(1, sampler, 1, question, trace)
             for sampler in ("policy", "posterior") for question in ("a", "b") for trace in range(50)}  # fmt: skip
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert (
        derive_seed(1, "policy", 1, "a", 0)
        == derive_seed(1, "policy", 1, "a", 0)
        != derive_seed(2, "policy", 1, "a", 0)
    )


def test_pass_at_k_equals_counting_all_subsets():
    from itertools import combinations

    for correct in range(6):
        outcomes = [True] * correct + [False] * (5 - correct)
        for k in range(1, 6):
            subsets = [any(subset) for subset in combinations(outcomes, k)]
            assert pass_at_k(5, correct, k) == pytest.approx(sum(subsets) / len(subsets))


def test_accuracy_counts_questions_without_any_answer_as_wrong():
    import numpy as np

    from megavar.records import Answer, Question

    questions = [Question(str(index), "x", "1") for index in range(4)]
    ids = np.zeros(0, np.int32)
    answers = [Answer("0", index, 0, 1, ids, "", "stop", 0, index < 1, "") for index in range(2)]
    found = accuracy(questions, answers, num_samples=2, k=1, num_bootstrap=200, seed=0)
    assert found.mean == pytest.approx(0.5 / 4) and found.low <= found.mean <= found.high


def test_the_resolved_configuration_is_saved_with_the_run(run):
    assert load_config(run.folder / "config.yaml", []) == run.config
