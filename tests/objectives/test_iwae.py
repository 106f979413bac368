"""The policy's weights (equation 8) against hand arithmetic and an independent float64 reference."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.made_scores import random_scores, score, weigh

from megavar.objectives import OBJECTIVES


def weights_of(found):
    return [row.weight for row in found]


def test_weights_by_hand():
    # d_0 = mean(-1+2, -1+2) = 1, a_0 = 1/2; d_1 = mean(-3+1) = -2, a_1 = 1: e^1/2 against e^-2.
    found = weigh([score(0, [-1, -1], [-2, -2], 1, 2), score(1, [-3], [-1], 2, 2)])
    left, right = np.exp(1) / 2, np.exp(-2)
    assert weights_of(found) == pytest.approx([left / (left + right), right / (left + right)], rel=1e-12)
    assert found[0].log_ratio == 1.0 and found[0].log_answer == pytest.approx(np.log(0.5), rel=1e-15)
    assert found[0].log_weight == pytest.approx(1 + np.log(0.5), rel=1e-15)
    assert [(row.question_id, row.trace_index, row.round, row.status) for row in found] == [
        ("q", 0, 1, "ok"), ("q", 1, 1, "ok")]  # fmt: skip


@pytest.mark.parametrize("ratio", ["geometric_mean", "sequence", "none"])
@pytest.mark.parametrize("answer", ["accuracy", "geometric_mean", "likelihood"])
def test_weights_equal_a_float64_reference(ratio, answer):
    scores = random_scores(8)
    found = weigh(scores, ratio=ratio, answer_estimator=answer)
    rho = []
    for row in scores:
        difference = row.logp_policy.astype(float) - row.logp_posterior.astype(float)
        d = {"geometric_mean": difference.mean(), "sequence": difference.sum(), "none": 0.0}[ratio]
        logs = row.logp_answer.astype(float)
        a = {"accuracy": row.num_correct / row.num_answers, "geometric_mean": np.exp(logs.mean()),
             "likelihood": np.exp(logs.sum())}[answer]  # fmt: skip
        rho.append(np.exp(d) * a)
    assert weights_of(found) == pytest.approx((np.array(rho) / sum(rho)).tolist(), rel=1e-12)


def test_a_single_trace_has_weight_one():
    assert weights_of(weigh([score(0, [-300.0], [-1.0])], ratio="sequence")) == [1.0]


def test_a_trace_without_correct_answer_gets_nothing_and_the_others_all():
    found = weigh([score(0, [-1], [-1], 0), score(1, [-1], [-1], 1)])
    assert weights_of(found) == [0.0, 1.0]
    assert found[0].log_answer == -np.inf and found[0].status == "ok"


def test_log_weights_of_minus_1e5_still_share_by_their_difference():
    # 1,000 tokens of -100 each; the second trace's sum is greater by 1.
    low = [-100.0] * 1000
    found = weigh([score(0, low, [0.0] * 1000), score(1, [*low, 0.0], [0.0] * 1000 + [-1.0])], ratio="sequence")
    assert found[0].log_ratio == -1e5
    assert weights_of(found) == pytest.approx([1 / (1 + np.e), np.e / (1 + np.e)], rel=1e-9)


def test_no_correct_trace_is_dropped():
    found = weigh([score(0, [-1], [-1], 0), score(1, [-1], [-1], 0)])
    assert [(row.weight, row.status) for row in found] == [(0.0, "no_correct_trace")] * 2


def test_no_correct_trace_falls_back_to_gold():
    found = weigh([score(0, [-1], [-1], 0)], on_no_correct_trace="gold")
    assert [(row.question_id, row.trace_index, row.round, row.weight, row.status) for row in found] == [
        ("q", 0, 1, 0.0, "no_correct_trace"), ("q", -1, 1, 1.0, "gold")]  # fmt: skip


def test_no_correct_trace_falls_back_to_the_geometric_mean():
    scores = [score(0, [-1], [-1], 0, reference=[-1.0, -3.0]), score(1, [-1], [-1], 0, reference=[-1.0, -1.0])]
    found = weigh(scores, on_no_correct_trace="geometric_mean")
    assert weights_of(found) == pytest.approx((np.exp([-2, -1]) / np.exp([-2, -1]).sum()).tolist())
    assert {row.status for row in found} == {"no_correct_trace"}
    cut = weigh(scores, [True, False], on_no_correct_trace="geometric_mean")
    assert [(row.weight, row.status) for row in cut] == [(0.0, "truncated"), (1.0, "no_correct_trace")]


@pytest.mark.parametrize("fallback", ["drop", "gold", "geometric_mean"])
def test_a_correct_trace_needs_no_fallback(fallback):
    scores = random_scores(4)
    assert weigh(scores, on_no_correct_trace=fallback) == weigh(scores)


def test_truncated_traces_are_left_out_whatever_their_scores():
    empty = np.zeros(0, np.float32)
    cut = replace(score(1, empty, empty, None, None), logp_answer=None)
    found = weigh([score(0, [-1], [-1]), cut], [False, True])
    assert [(row.weight, row.status) for row in found] == [(1.0, "ok"), (0.0, "truncated")]


@pytest.mark.parametrize("fallback", ["drop", "gold", "geometric_mean"])
def test_a_question_of_truncated_traces_has_no_weight_but_gold(fallback):
    found = weigh([score(0, [-1], [-1]), score(1, [-1], [-1])], [True, True], on_no_correct_trace=fallback)
    expected = [(0, 0.0, "truncated"), (1, 0.0, "truncated")] + ([(-1, 1.0, "gold")] if fallback == "gold" else [])
    assert [(row.trace_index, row.weight, row.status) for row in found] == expected


def test_weights_do_not_depend_on_the_order_of_traces():
    scores = random_scores(6)
    backward = weigh(scores[::-1])[::-1]
    assert weights_of(weigh(scores)) == pytest.approx(weights_of(backward), rel=1e-14)


def test_weights_do_not_depend_on_a_constant_added_to_every_ratio():
    scores = random_scores(6)
    shifted = [replace(row, logp_policy=row.logp_policy.astype(np.float64) - 50) for row in scores]
    assert weights_of(weigh(shifted)) == pytest.approx(weights_of(weigh(scores)), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"num_answers": None}, {}, "verify"),
        ({"logp_answer": None}, {"answer_estimator": "likelihood"}, "logp_answer.*score stage"),
        ({"logp_answer": None}, {"answer_estimator": "geometric_mean"}, "logp_answer.*score stage"),
        ({"logp_posterior": None}, {}, "logp_posterior.*score stage"),
        ({"logp_posterior": np.zeros(3, np.float32)}, {}, "has 1 tokens, logp_posterior 3"),
        ({"logp_policy": np.array([np.nan], np.float32)}, {}, "not finite"),
        ({"logp_posterior": np.array([-np.inf], np.float32)}, {}, "not finite"),
    ],
)
def test_missing_or_broken_scores_are_refused_by_name(change, settings, message):
    with pytest.raises(ValueError, match=f"trace 0 of question 'q'.*{message}"):
        weigh([replace(score(0, [-1], [-1]), **change)], **settings)


def test_no_posterior_is_needed_without_a_ratio():
    assert weights_of(weigh([replace(score(0, [-1], [-1]), logp_posterior=None)], ratio="none")) == [1.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_traces_of_two_questions_doubled_traces_and_missing_flags_are_refused(name):
    one, same = score(0, [-1], [-1]), score(0, [-2], [-1])
    with pytest.raises(ValueError, match=r"\['other', 'q'\]"):
        weigh([one, score(1, [-1], [-1], question="other")], name=name)
    with pytest.raises(ValueError, match=r"'q' has duplicate trace indices \[0, 0\]"):
        weigh([one, same], name=name)
    with pytest.raises(ValueError, match="'q' has 1 scores but 2 truncated"):
        weigh([one], [False, False], name=name)
