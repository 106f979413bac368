"""docs/configuration.md is what the schema and the plan say today."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("configuration_page", ROOT / "tools" / "write_configuration_page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


@pytest.fixture(scope="module")
def affected(tmp_path_factory):
    return page.affected(tmp_path_factory.mktemp("stages"))


def test_the_page_is_current(affected):
    assert page.PAGE.read_text() == page.page_text(affected), (
        "run `python tools/write_configuration_page.py` and commit it"
    )


@pytest.mark.parametrize(
    ("key", "changes", "adds"),
    [
        ("sft.learning_rate", {"sft"}, set()),
        ("posterior.num_rollouts", {"rollouts"}, set()),
        ("objective.ratio", {"weigh"}, set()),
        ("sample.num_answers", {"rollouts", "sample"}, set()),
        ("data.questions_per_round", {"rollouts", "posterior", "sample", "verify", "score", "policy"}, set()),
        ("data.eval", {"eval"}, {"eval"}),
        ("policy.train.microbatch_tokens", set(), set()),
        ("parallel.pipeline", set(), set()),
        ("name", set(), set()),
    ],
)
def test_a_key_affects_the_stages_that_record_it(affected, key, changes, adds):
    assert affected[key] == (changes, adds)


def test_a_key_may_decide_which_stages_run(affected):
    assert affected["posterior.source"][1] == {"rollouts", "posterior"}
    assert affected["rounds"][1] == {stage.name for stage in page.STAGES} - {"sft"}


@dataclass
class Undocumented:
    """A section whose second key says nothing of itself."""

    first: int = 1
    """One."""
    second: int = 2


def test_a_key_without_a_docstring_is_refused(monkeypatch):
    assert page.docstrings(Undocumented) == {"first": "One."}
    monkeypatch.setattr(page, "RunConfig", Undocumented)
    with pytest.raises(ValueError, match="second has no docstring"):
        page.page_text({"first": (set(), set()), "second": (set(), set())})
