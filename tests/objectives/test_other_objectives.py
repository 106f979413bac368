"""The posterior's weights, plain finetuning, and the registry."""

import numpy as np
import pytest
from helpers.made_scores import score, weigh

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
    with pytest.raises(ValueError, match=r"'nope'.*iwae, elbo, rft"):
        get_objective("nope")


def test_elbo_weighs_every_whole_trace_alike_whatever_its_answer():
    scores = [score(0, [-9], [0], 0), score(1, [0], [-9], 2), score(2, [-1], [-1])]
    found = weigh(scores, [False, True, False], name="elbo", answer_estimator="likelihood")
    assert [(row.weight, row.status) for row in found] == [(0.5, "ok"), (0.0, "truncated"), (0.5, "ok")]
    assert found[0].log_weight == pytest.approx(-9.75, rel=1e-12)


@pytest.mark.parametrize(("name", "factor"), [("rft", 0.25), ("reinforce", 0.25), ("grpo", (1 / 3) ** 0.5)])
def test_implied_weights_are_shares_times_the_questions_factor(name, factor):
    """Accuracies 2/2, 0/2, 0/2 and a truncated trace: P = 1/4; then 2/2 and 1/2 of four: P = 3/8."""
    scores = [score(index, [-1], [-1], 2 if index == 0 else 0, 2) for index in range(4)]
    found = weigh(scores, [False, False, False, True], name=name, ratio="none")
    assert [row.weight for row in found] == pytest.approx([factor, 0, 0, 0], rel=1e-12)
    scores[1] = score(1, [-1], [-1], 1, 2)
    shares = [row.weight for row in weigh(scores, [False, False, False, True], name=name, ratio="none")]
    assert shares[0] / shares[1] == pytest.approx(2, rel=1e-12)
    assert sum(shares) == pytest.approx(3 / 8 if name != "grpo" else (3 / 5) ** 0.5, rel=1e-12)


def test_reference_selection_by_likelihood_takes_the_largest_sum_of_means():
    """d + mean answer log-prob: 1 - 2, 0 - 0.5, 2 - 1 (truncated)."""
    scores = [
        score(0, [-1, -1], [-2, -2], reference=[-2.0]),
        score(1, [-1], [-1], 0, reference=[-0.25, -0.75]),
        score(2, [-1], [-3], reference=[-1.0]),
    ]
    found = weigh(scores, [False, False, True], name="reference_gml")
    assert [row.weight for row in found] == [0.0, 1.0, 0.0]


def test_reference_selection_by_accuracy_takes_correct_traces_only_and_falls_back_to_gold():
    """accuracy x exp(d): 1/4 x e, 3/4 x 1, none."""
    scores = [score(0, [-1], [-2], 1, 4), score(1, [-1], [-1], 3, 4), score(2, [0], [-9], 0, 4)]
    assert [row.weight for row in weigh(scores, name="reference_acc")] == [0.0, 1.0, 0.0]
    last = weigh([score(0, [-1], [-1], 0, 4)], name="reference_acc")[-1]
    assert (last.trace_index, last.weight, last.status) == (-1, 1.0, "gold")


@pytest.mark.parametrize("name", ["reference_gml", "reference_acc"])
def test_reference_selection_leaves_out_very_long_traces(name):
    scores = [score(0, [-1.0] * 28_000, [-9.0] * 28_000), score(1, [-1], [-1])]
    assert [row.weight for row in weigh(scores, name=name)] == [0.0, 1.0]


def test_reverse_kl_weights_sum_to_zero_and_bound_the_accuracy():
    """f = d_sequence + log((c + 1/2) / (n + 1)); weight = (f_k - mean of the others) / K."""
    scores = [score(0, [-1, -1], [-2, -2], 0, 3), score(1, [-1], [-1], 3, 3)]
    values = [2 + np.log(0.5 / 4), np.log(3.5 / 4)]
    found = [row.weight for row in weigh(scores, name="reverse_kl")]
    assert found == pytest.approx([(values[0] - values[1]) / 2, (values[1] - values[0]) / 2], rel=1e-12)


def test_reverse_kl_gives_a_lone_trace_no_weight():
    assert [row.weight for row in weigh([score(0, [-1], [-2], 1, 3)], name="reverse_kl")] == [0.0]
