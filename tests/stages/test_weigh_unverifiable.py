"""Questions without a verifier: weights by the geometric mean of the reference answer, or none."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.made_scores import score

from megavar.config.schema import ObjectiveConfig
from megavar.objectives import OBJECTIVES
from megavar.record_files import read_records
from megavar.records import Trace
from megavar.records import Weight as WeightRecord
from megavar.stages.weigh import weigh_traces

REFERENCE = ([-2.0], [-0.25, -0.75], [-1.0])
SCORES = [
    score(0, [-1, -1], [-2, -2], 0, 0, reference=REFERENCE[0]),
    score(1, [-1], [-1], 0, 0, reference=REFERENCE[1]),
    score(2, [-1], [-3], None, None, reference=REFERENCE[2]),
]
FINISHES = ("closed", "closed", "length")


def weigh(tmp_path, name="iwae", scores=SCORES, **settings):
    ids = np.array([1], np.int32)
    traces = [Trace("q", index, 1, "posterior", ids, ids, None, finish, 0) for index, finish in enumerate(FINISHES)]
    weigh_traces([(traces, scores)], name, ObjectiveConfig(name=name, **settings), tmp_path)
    return read_records(tmp_path / "data.parquet", WeightRecord)


def test_weights_are_those_of_the_geometric_mean(tmp_path):
    """log rho: 1 - 2, 0 - 0.5; the third trace is truncated."""
    rows = weigh(tmp_path)
    expected = np.exp([-1.0, -0.5]) / np.exp([-1.0, -0.5]).sum()
    assert [row.weight for row in rows] == pytest.approx([*expected, 0.0], rel=1e-12)
    assert [row.status for row in rows] == ["unverifiable", "unverifiable", "truncated"]


def test_they_can_be_left_out(tmp_path):
    rows = weigh(tmp_path, on_unverifiable="drop")
    assert [row.weight for row in rows] == [0.0, 0.0, 0.0]
    assert [row.status for row in rows] == ["unverifiable", "unverifiable", "truncated"]


def test_an_objective_by_likelihood_needs_no_verifier(tmp_path):
    """VeriFree's weights: the likelihood of the reference answer over K; the truncated trace counts as 0."""
    settings = {"ratio": "none", "answer_estimator": "likelihood", "train_answers": "reference"}
    own = [replace(row, logp_posterior=None) for row in SCORES]
    rows = weigh(tmp_path, "reinforce", own, **settings)
    assert [row.weight for row in rows] == pytest.approx([np.exp(-2) / 3, np.exp(-1) / 3, 0.0], rel=1e-7)
    assert [row.status for row in rows] == ["unverifiable", "unverifiable", "truncated"]


def test_the_reference_rule_takes_the_best_by_likelihood_as_its_scripts_do(tmp_path):
    """d + mean log-prob of the answer, as `reference_gml`, and no gold trace."""
    rows = weigh(tmp_path, "reference_acc")
    assert [(row.trace_index, row.weight) for row in rows] == [(0, 0.0), (1, 1.0), (2, 0.0)]


@pytest.mark.parametrize("name", sorted(name for name, item in OBJECTIVES.items() if item.posterior_source is None))
def test_every_objective_weighs_them(tmp_path, name):
    answers = "geometric_mean" if OBJECTIVES[name].needs_reference_answer else "accuracy"
    reference = {"train_answers": "reference", "answer_estimator": answers} if answers != "accuracy" else {}
    rows = weigh(tmp_path, name, **reference)
    assert sum(row.weight for row in rows) > 0
    dropped = weigh(tmp_path, name, on_unverifiable="drop", **reference)
    assert sum(row.weight for row in dropped) == 0


def test_answers_that_were_never_counted_are_still_an_error(tmp_path):
    unjudged = [replace(row, num_answers=None, num_correct=None) for row in SCORES]
    ids = np.array([1], np.int32)
    traces = [Trace("q", index, 1, "posterior", ids, ids, None, finish, 0) for index, finish in enumerate(FINISHES)]
    with pytest.raises(ValueError, match="has no verified answers"):
        weigh_traces([(traces, unjudged)], "iwae", ObjectiveConfig(), tmp_path)
