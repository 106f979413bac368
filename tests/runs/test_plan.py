"""What a stage depends on: made under other settings, it is refused before anything is written."""

import json
from importlib import import_module

import pytest

from megavar.config.load import load_config
from megavar.runs import plan
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, NotFinished

ALONE = ["sft", "posterior", "sample", "verify", "score", "weigh"]


@pytest.fixture
def load(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    (tmp_path / "run.yaml").write_text(
        f"name: a\nruns_dir: {tmp_path}\nmodel: m\n"
        f"data: {{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}\n"
    )
    return lambda *overrides: load_config(tmp_path / "run.yaml", list(overrides))


def make(config, last):
    """Finish the stages up to `last`, or up to the end."""
    for stage, run in plan.stages_of(config):
        manifest, name = Manifest(run.folder), run.entry(stage.name)
        run.open()
        manifest.begin(name, stage.settings(run))
        manifest.finish(name, 1.0, [])
        if name == last:
            return


@pytest.mark.parametrize(
    ("last", "overrides", "message"),
    [
        (
            "weigh",
            ["objective.name=rft", "objective.ratio=none"],
            r"stage weigh .* objective\.name='iwae', now .*'rft'",
        ),
        ("weigh", ["sft.learning_rate=7"], r"stage sft was finished with sft\.learning_rate="),
        ("eval", ["eval.num_samples=9"], r"stage eval was finished with eval\.num_samples=4, now it is 9"),
        ("policy_02", ["rounds=2", "policy.train.epochs=9"], r"stage policy was finished with policy\.train\.epochs"),
    ],
)
def test_what_was_made_under_other_settings_is_refused(load, last, overrides, message):
    make(load("rounds=2") if last.endswith("02") else load(), last)
    with pytest.raises(ValueError, match=message):
        plan.check_outputs(load(*overrides))


def test_settings_of_what_is_not_made_yet_may_change(load):
    make(load(), "weigh")
    plan.check_outputs(load("policy.train.epochs=9", "eval.num_samples=9", "rounds=2", "sft.save_interval=3"))


def test_a_finished_run_goes_on_with_the_rounds_that_are_added(load):
    make(load(), "")
    config = load("rounds=2")
    plan.check_outputs(config)
    manifest, names = Manifest(Run(config).folder), [run.entry(stage.name) for stage, run in plan.stages_of(config)]
    assert [name for name in names if name not in manifest.entries()] == [
        f"{stage}_02" for stage in ("sample", "verify", "score", "weigh", "policy", "export", "eval")
    ]


def test_a_run_whose_middle_is_to_be_rerun_goes_on(load):
    config = load()
    make(config, "eval")
    manifest = Manifest(Run(config).folder)
    entries = manifest.entries()
    del entries["sample"]
    manifest.file.write_text(json.dumps(entries))
    plan.check_outputs(config)
    with pytest.raises(NotFinished, match="stage sample is not finished; run `megavar sample` first"):
        plan.find_stage(config, "verify")[0].settings(Run(config))


@pytest.mark.parametrize("source", ["gold", "rollout", "reverse_kl", "prompt"])
def test_every_stage_of_every_round_has_settings(load, source):
    config = load("rounds=2", f"posterior.source={source}", "posterior.allow_collapse=true")
    make(config, "")
    made = list(Manifest(Run(config).folder).entries())
    assert len(made) == len(plan.stages_of(config)) and made[-1] == "eval_02"
    assert ("posterior" in made) == (source != "prompt") and ("rollouts_02" in made) == (source == "rollout")
    assert ("posterior_02" in made) == (source in ("rollout", "reverse_kl"))


def test_stages_are_found_by_name(load):
    stage, run = plan.find_stage(load("rounds=3"), "policy_03")
    assert (stage.name, run.round_index) == ("policy", 3)
    with pytest.raises(ValueError, match=r"no stage 'policy_02' in this run; its stages are sft, posterior, sample"):
        plan.find_stage(load(), "policy_02")


def test_every_stage_has_the_module_that_executes_it():
    for stage in plan.STAGES:
        assert callable(import_module(f"megavar.stages.{stage.name}").execute)
