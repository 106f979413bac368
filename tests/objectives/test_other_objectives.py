"""The posterior's weights, plain finetuning, and the registry."""

import numpy as np
import pytest
from made_scores import score, weigh

from megavar.objectives import get_objective


def test_posterior_weights_are_accuracies_without_a_ratio():
    found = weigh([score(0, [-9], [0], 1, 4), score(1, [0], [-9], 3, 4)], name="forward_kl")
    assert [row.weight for row in found] == pytest.approx([0.25, 0.75], rel=1e-12)
    assert {row.log_ratio for row in found} == {0.0}


def test_posterior_rollouts_that_are_truncated_or_never_right_get_nothing():
    found = weigh([score(0, [-1], [-1], 0), score(1, [-1], [-1], 2)], [False, True], name="forward_kl")
    assert [(row.weight, row.status) for row in found] == [(0.0, "no_correct_trace"), (0.0, "truncated")]


def test_finetuning_weighs_every_whole_trace_alike():
    scores = [score(0, [-9], [0], 0), score(1, [0], [-9], 2), score(2, [-1], [-1], None, None)]
    found = weigh(scores, [False, True, False], name="sft")
    assert [(row.weight, row.status) for row in found] == [(1.0, "ok"), (0.0, "truncated"), (1.0, "ok")]
    assert found[1].log_weight == -np.inf


def test_an_unknown_objective_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'nope'.*iwae, forward_kl, sft"):
        get_objective("nope")
