"""Objectives are found by name, also outside the package, and say what settings they need."""

from dataclasses import replace
from pathlib import Path

import pytest

from megavar.config.load import load_config
from megavar.config.schema import ObjectiveConfig, SampleConfig
from megavar.objectives import OBJECTIVES, check_objective, get_objective
from megavar.objectives.base import Objective

ROOT = Path(__file__).parents[2]
OUTSIDE = """
from megavar.objectives import iwae
from megavar.objectives.base import Objective

def weigh(scores, truncated, config):
    return iwae.weigh(scores, truncated, config)

with_needs = Objective(weigh, needs_reference_answer=True)
number = 7
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_objectives.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sft"}, r"objective\.name=sft .*objective\.train_answers=all_correct.*answers=reference"),
        ({"name": "elbo"}, r"objective\.name=elbo .*answers=reference"),
        ({"name": "reverse_kl"}, r"use posterior\.source=reverse_kl"),
        ({"name": "rft", "on_no_correct_trace": "gold"}, r"on_no_correct_trace=gold has no effect .*rft"),
        ({"name": "grpo", "num_traces": 1}, r"objective\.name=grpo compares .* sample\.num_answers=1 with one trace"),
        ({"name": "odd"}, r"objective\.name='odd' is unknown; use one of iwae, elbo, .*package\.module:name"),
        ({"name": "odd_module:weigh"}, r"'odd_module:weigh' cannot be imported \(No module named 'odd_module'\)"),
        ({"name": "outside_objectives:lacks"}, r"cannot be imported \(.*no attribute 'lacks'\)"),
        ({"name": "outside_objectives:number"}, r"is 7; expected an Objective or a Weigh function"),
        ({"name": "outside_objectives:with_needs"}, r"needs one; use objective\.train_answers=reference"),
    ],
)
def test_an_objective_whose_needs_the_settings_do_not_meet_is_refused(outside, settings, message):
    with pytest.raises(ValueError, match=message):
        check_objective(ObjectiveConfig(**settings), SampleConfig(num_answers=1))


def test_a_function_from_outside_is_an_objective(outside):
    objective = check_objective(ObjectiveConfig(name="outside_objectives:weigh"), SampleConfig())
    assert objective == Objective(objective.weigh) and objective.weigh.__module__ == "outside_objectives"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_works_under_the_settings_that_its_configuration_file_gives_it(tmp_path, name):
    file = ROOT / "conf" / "objective" / f"{name}.yaml"
    (tmp_path / "run.yaml").write_text(f"include: [{file}]\nname: a\nmodel: m\ndata: {{train: t.jsonl}}\n")
    config = load_config(tmp_path / "run.yaml", [])
    if get_objective(name).posterior_source is not None:
        assert config.posterior.source == {"forward_kl": "rollout", "reverse_kl": "reverse_kl"}[name]
        with pytest.raises(ValueError, match=r"trains the posterior, but objective\.name selects"):
            check_objective(replace(config.objective, name=name), config.sample)
    else:
        assert config.objective.name == name and check_objective(config.objective, config.sample)
