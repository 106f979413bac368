"""The manifest skips what is finished, refuses what changed, and metrics survive a restart."""

import contextlib
import json
from dataclasses import replace

import pytest

from megavar.config.load import load_config
from megavar.config.schema import LoggingConfig, TrainConfig
from megavar.evaluation.pass_at_k import accuracy, pass_at_k
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, flat
from megavar.runs.metrics import Metrics
from megavar.runs.plan import Stage
from megavar.stages.runner import run_once
from megavar.stages.sample import derive_seed


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.yaml").write_text(f"name: a\nruns_dir: {tmp_path}\nmodel: m\ndata: {{train: t.jsonl}}\n")
    found = Run(load_config(tmp_path / "run.yaml", []))
    found.open()
    return found


def stage(name, key="rounds", inputs=(), outputs=()):
    """A stage that depends on one key of the configuration."""
    return Stage(name, "", "", "", lambda config: (key,), lambda run: {entry: entry for entry in inputs},
                 lambda run: [run.folder / output for output in outputs])  # fmt: skip


def set_to(run, **values):
    return replace(run, config=replace(run.config, **values))


def test_rounds_take_the_same_questions_or_the_next_ones(run):
    data = replace(run.config.data, questions_per_round=3)
    for fresh, expected in ((False, ["012", "012", "012"]), (True, ["012", "345", "67"])):
        of_run = set_to(run, rounds=3, data=replace(data, fresh_questions=fresh))
        taken = [replace(of_run, round_index=index).take_questions(list("01234567")) for index in (1, 2, 3)]
        assert ["".join(questions) for questions in taken] == expected


def test_a_finished_stage_is_skipped_and_an_interrupted_one_repeated(run):
    calls = []
    with pytest.raises(RuntimeError):
        run_once(run, stage("sample"), lambda: (_ for _ in ()).throw(RuntimeError))
    assert Manifest(run.folder).entries()["sample"]["status"] == "begun"
    for _ in range(2):
        run_once(run, stage("sample"), lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_key_and_nothing_runs(run, finished):
    def work():
        if not finished:
            raise RuntimeError

    with contextlib.suppress(RuntimeError):
        run_once(run, stage("sample"), work)
    with pytest.raises(ValueError, match=r"stage sample was (begun|finished) with rounds=1, now it is 2"):
        run_once(set_to(run, rounds=2), stage("sample"), lambda: pytest.fail("ran"))


def test_a_stage_before_its_input_says_which_is_missing(run):
    with pytest.raises(ValueError, match="stage weigh is not finished; run `megavar weigh` first"):
        Manifest(run.folder).digest("weigh")


def write_then(run, name, content, **others):
    """Do a stage that writes one file."""
    run_once(run, stage(name, outputs=[name], **others), lambda: (run.folder / name).write_text(content))


def forget(run, name):
    manifest = Manifest(run.folder)
    entries = manifest.entries()
    del entries[name]
    manifest.file.write_text(json.dumps(entries))


def test_a_stage_is_refused_after_what_it_read_was_made_again_otherwise_and_not_after_the_same(run):
    write_then(run, "sample", "one")
    write_then(run, "verify", "x", inputs=["sample"])
    forget(run, "sample")
    write_then(run, "sample", "one")
    write_then(run, "verify", "not again", inputs=["sample"])
    assert (run.folder / "verify").read_text() == "x"
    forget(run, "sample")
    write_then(run, "sample", "two")
    with pytest.raises(ValueError, match="stage verify was finished with sample="):
        write_then(run, "verify", "y", inputs=["sample"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_text("on"), "has 2 bytes, the stage wrote 3"),
        (lambda file: file.write_text("0ne"), "has another checksum than what the stage wrote"),
    ],
    ids=["missing", "cut", "flipped"],
)
def test_a_stage_refuses_what_it_reads_if_it_is_not_what_was_written_and_says_the_way_out(run, change, problem):
    write_then(run, "sample", "one")
    change(run.folder / "sample")
    with pytest.raises(ValueError, match=rf"sample of the finished stage sample {problem}.*remove the entry sample of"):
        write_then(run, "verify", "x", inputs=["sample"])
    assert "verify" not in Manifest(run.folder).entries()
    forget(run, "sample")
    write_then(run, "sample", "one")
    write_then(run, "verify", "x", inputs=["sample"])


DAMAGED = ["", "{", "[]", "3", '{"sft": 1}', '{"sft": {}}', '{"sft": {"settings": {}, "status": "odd"}}',
           '{"sft": {"settings": {}, "status": "finished"}}', "\xff", "[" * 100_000,
           '{"sft": {"settings": {}, "status": "finished", "digest": "", "outputs": {}, "seconds": "1"}}']  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_manifest_is_named_with_the_way_out(run, content):
    write_then(run, "sample", "one")
    digest = Manifest(run.folder).digest("sample")
    (run.folder / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"manifest\.json is damaged or of another version .*; restore it, or remove it:"
    ):
        write_then(run, "sample", "one")
    (run.folder / "manifest.json").unlink()
    write_then(run, "sample", "one")
    assert Manifest(run.folder).digest("sample") == digest


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
