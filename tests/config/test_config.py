"""Configuration: one default each, unknown keys fail, contradictions name both keys, shipped files load."""

from pathlib import Path

import pytest

from megavar.config.load import load_config, load_evaluation, save_config

ROOT = Path(__file__).parents[2]
OTHER_NAMES = {"verifree": "reinforce", "maxrl": "iwae", "raft": "iwae", "sir": "iwae"}
"""Published methods that an objective is under other settings."""
REVERSE_KL = ("posterior.source=reverse_kl", "posterior.allow_collapse=true")
MINIMAL = "name: a\nmodel: m\ndata: {train: t.jsonl}\n"


def load(folder, *overrides, text=MINIMAL):
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml", list(overrides))


def test_overrides_win_over_the_file_and_the_file_over_includes(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 5\nsample: {num_traces: 5, num_answers: 5}\n")
    text = MINIMAL + "include: [base.yaml]\nsample: {num_traces: 6}\n"
    config = load(tmp_path, "sample.num_answers=7", text=text)
    assert (config.seed, config.sample.num_traces, config.sample.num_answers) == (5, 6, 7)


def test_a_saved_configuration_loads_to_the_same(tmp_path):
    config = load(tmp_path, "posterior.train.learning_rate=1e-4")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == config


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], []),
        ("", ["reuse=runs/a"], ["runs/a"]),
        ("", ["reuse=[runs/a,runs/b]"], ["runs/a", "runs/b"]),
        ("reuse: ${runs_dir}/a\n", [], ["runs/a"]),
        ("reuse: [runs/a, runs/b]\n", ["reuse=runs/c"], ["runs/c"]),
    ],
)
def test_one_run_or_several_can_be_reused(tmp_path, text, overrides, expected):
    assert load(tmp_path, *overrides, text=MINIMAL + text).reuse == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample.nope=1"], "nope"),
        (["sample.num_traces=many"], "many"),
        (["sample.num_traces=0"], r"sample\.num_traces=0 is too small"),
        (["precision.recipe=fp16"], r"precision\.recipe='fp16' is unknown; use one of fp32, bf16, fp8_delayed"),
        (["seed"], "not of the form key=value"),
        (
            ["objective.answer_estimator=likelihood"],
            r"objective\.answer_estimator=likelihood.*objective\.train_answers=all_correct",
        ),
        (["sample.max_trace_tokens=4096"], r"sample\.max_trace_tokens.*data\.max_sequence_tokens"),
        (["rollout.mode=external"], r"rollout\.mode=external needs rollout\.urls"),
        (["rollout.urls=[http://x]"], r"rollout\.urls.*rollout\.mode"),
        (
            ["objective.min_weight=0.1", "objective.selection=best"],
            r"objective\.min_weight=0\.1.*objective\.selection=best",
        ),
        (["objective.num_traces=9"], r"objective\.num_traces=9 is not between 1 and sample\.num_traces=8"),
        (["sample.sampler=policy"], r"sample\.sampler=policy has no ratio.*objective\.ratio=geometric_mean"),
        (["posterior.source=reverse_kl", "rounds=2"], r"under which q collapses .*or posterior\.allow_collapse=true"),
        ([*REVERSE_KL], r"posterior\.source=reverse_kl learns from .* round before, but rounds=1"),
        ([*REVERSE_KL, "rounds=2", "sample.num_traces=1"], r"as the baseline, but .* is 1"),
        (
            ["posterior.source=rollout", "sample.sampler=policy", "objective.ratio=none"],
            r"posterior\.source=rollout has no effect with sample\.sampler=policy",
        ),
        (
            ["posterior.source=prompt", "sample.sampler=policy", "objective.ratio=none"],
            r"posterior\.source=prompt has no effect with sample\.sampler=policy",
        ),
        (["data.fresh_questions=true"], r"data\.fresh_questions=true needs data\.questions_per_round"),
        (["eval.models=[odd]"], r"eval\.models=\['odd'\]"),
        (["parallel.virtual_pipeline=2"], r"parallel\.virtual_pipeline=2 needs parallel\.pipeline"),
        (["sft.optimizer_offload=2"], r"sft\.optimizer_offload=2\.0 is a fraction"),
        (
            ["policy.train.optimizer_moments=bf16", "policy.train.distributed_optimizer=false"],
            r"policy\.train\.optimizer_moments=bf16 needs .* policy\.train\.distributed_optimizer=false",
        ),
        (["score.precision=fp8_delayed"], r"score\.precision='fp8_delayed' is unknown; use one of auto, fp32, bf16"),
    ],
)
def test_wrong_values_are_refused_by_key(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.server_args=[--api-key,S3CRET]"], "rollout.server_args has --api-key, which would be saved"),
        (["rollout.server_args=[--admin=S3CRET]"], "rollout.server_args has --admin-api-key, which would be saved"),
        (
            ["rollout.mode=external", "rollout.urls=[http://me:S3CRET@host:1]"],
            "rollout.urls has a URL with a user name",
        ),
        (["rollout.urls=[http://host:1?key=S3CRET]"], "rollout.urls has a URL with a user name"),
        (["rollout.api_key_env=NAME"], r"rollout.api_key_env=NAME is ignored in rollout.mode=managed"),
        (["rollout.api_key_file=F"], r"rollout.api_key_file=F is ignored in rollout.mode=managed"),
        (
            ["rollout.mode=external", "rollout.urls=[http://a]", "rollout.api_key_env=A", "rollout.api_key_file=F"],
            r"rollout.api_key_env=A and rollout.api_key_file=F both name",
        ),
        (["rollout.worker_urls=[http://x]"], r"rollout.worker_urls.*ignored in rollout.mode=managed"),
        (["rollout.worker_urls=[http://me:S3CRET@host:1]"], "rollout.worker_urls has a URL with a user name"),
    ],
)
def test_secrets_that_would_be_saved_are_refused_and_not_repeated(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, *overrides)
    assert "S3CRET" not in str(caught.value)


def test_missing_values_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no value for data\.train, model"):
        load(tmp_path, text="name: a\n")
    with pytest.raises(ValueError, match="No config file"):
        load_config(tmp_path / "none.yaml", [])


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configurations_load(file):
    assert load_config(file, ["model=m"]).name


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "objective").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_objective_has_a_configuration_that_any_run_can_include(tmp_path, file):
    (tmp_path / "run.yaml").write_text(f"include: [{file}]\nname: a\nmodel: m\ndata: {{train: t.jsonl}}\n")
    config = load_config(tmp_path / "run.yaml", [])
    if file.stem in ("forward_kl", "reverse_kl"):
        assert config.posterior.source == {"forward_kl": "rollout", "reverse_kl": "reverse_kl"}[file.stem]
    else:
        assert config.objective.name == OTHER_NAMES.get(file.stem, file.stem)


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda file: file.name)
def test_an_evaluation_takes_its_sections_of_any_run(file):
    config = load_evaluation(file, ["eval.num_samples=3"])
    run = load_config(file, ["model=m", "eval.num_samples=3"])
    assert config == run.evaluation and config.sample is not run.sample


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "eval").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_protocol_of_evaluation_loads_alone_and_in_any_run(tmp_path, file):
    alone = load_evaluation(file, ["eval.suites=[a.jsonl]", "eval.pass_at=[1,8]"])
    assert (alone.sample.temperature, alone.eval.suites, alone.eval.pass_at) == (0.7, ["a.jsonl"], [1, 8])
    (tmp_path / "run.yaml").write_text(
        f"include: [{file}]\nname: a\nmodel: m\ndata: {{train: t.jsonl, max_sequence_tokens: 32768}}\n"
    )
    assert load_config(tmp_path / "run.yaml", []).sample == alone.sample


def test_an_evaluation_is_validated_and_saved_as_it_loads(tmp_path):
    config = load_evaluation(None, ["eval.suites=[a.jsonl]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_evaluation(tmp_path / "saved.yaml", []) == config
    with pytest.raises(ValueError, match=r"eval\.pass_at=\[0\]"):
        load_evaluation(None, ["eval.pass_at=[0]"])
    with pytest.raises(ValueError, match=r"the command line: eval\.pass_at"):
        load_evaluation(None, ["eval.pass_at=[many]"])
    with pytest.raises(ValueError, match="nope"):
        load_evaluation(None, ["eval.nope=1"])


def test_text_that_is_no_yaml_is_one_line_that_names_the_file_or_the_override(tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml, line 2, column 8 is not valid YAML: mapping values") as error:
        load(tmp_path, text="name: a\n  model: [b\n")
    assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError,
        match=r"Override 'templates\.system=\{a\} b: \{', line 1, .* is not valid YAML: .* Quote the value\.",
    ):
        load(tmp_path, "templates.system={a} b: {")


def test_the_fewest_ranks_of_a_layout_hold_all_experts():
    from megavar.config.schema import ParallelConfig

    assert ParallelConfig(expert=2).least_ranks == 2 and ParallelConfig(tensor=2, expert=2).least_ranks == 2
    assert ParallelConfig(tensor=2, pipeline=3, expert=4).least_ranks == 12
