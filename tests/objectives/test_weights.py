"""Weights against hand arithmetic and an independent float64 reference."""

from dataclasses import replace

import numpy as np
import pytest

from megavar.config.schema import ObjectiveConfig
from megavar.objectives import get_objective
from megavar.objectives.weights import effective_sample_size, log_ratio, normalise, select
from megavar.records import Score, Weight

RNG = np.random.default_rng(5)


def score(index, policy, posterior, correct=1, answers=2, reference=(-0.5, -0.25)):
    policy, posterior = np.array(policy, np.float32), np.array(posterior, np.float32)
    return Score("q", index, 1, policy, posterior, np.array(reference, np.float32), answers, correct)


def random_scores(count):
    lengths = RNG.integers(1, 30, count)
    return [
        score(index, -RNG.exponential(1, n), -RNG.exponential(1, n), int(RNG.integers(1, 5)), 5)
        for index, n in enumerate(lengths)
    ]


def weigh(scores, truncated=None, name="iwae", **settings):
    return get_objective(name)(scores, truncated or [False] * len(scores), ObjectiveConfig(**settings))


def test_weights_by_hand():
    # d_0 = mean(-1+2, -1+2) = 1, a_0 = 1/2; d_1 = mean(-3+1) = -2, a_1 = 1: e^1/2 against e^-2.
    found = weigh([score(0, [-1, -1], [-2, -2], 1, 2), score(1, [-3], [-1], 2, 2)])
    left, right = np.exp(1) / 2, np.exp(-2)
    assert [row.weight for row in found] == pytest.approx([left / (left + right), right / (left + right)], rel=1e-12)
    assert found[0].log_ratio == 1.0 and found[0].log_answer == pytest.approx(np.log(0.5), rel=1e-15)
    assert found[0].log_weight == pytest.approx(1 + np.log(0.5), rel=1e-15)


@pytest.mark.parametrize("ratio", ["geometric_mean", "sequence", "none"])
@pytest.mark.parametrize("answer", ["accuracy", "geometric_mean", "likelihood"])
def test_weights_equal_a_float64_reference(ratio, answer):
    scores = random_scores(8)
    answers = "reference" if answer != "accuracy" else "all_correct"
    found = weigh(scores, ratio=ratio, answer=answer, answers=answers)
    rho = []
    for row in scores:
        difference = row.logp_policy.astype(float) - row.logp_posterior.astype(float)
        d = {"geometric_mean": difference.mean(), "sequence": difference.sum(), "none": 0.0}[ratio]
        logs = row.logp_answer.astype(float)
        a = {"accuracy": row.num_correct / row.num_answers, "geometric_mean": np.exp(logs.mean()),
             "likelihood": np.exp(logs.sum())}[answer]  # fmt: skip
        rho.append(np.exp(d) * a)
    assert [row.weight for row in found] == pytest.approx((np.array(rho) / sum(rho)).tolist(), rel=1e-12)


def test_a_single_trace_has_weight_one():
    assert [row.weight for row in weigh([score(0, [-300.0], [-1.0])], ratio="sequence")] == [1.0]


def test_a_trace_without_correct_answer_gets_nothing_and_the_others_all():
    found = weigh([score(0, [-1], [-1], 0), score(1, [-1], [-1], 1)])
    assert [row.weight for row in found] == [0.0, 1.0]
    assert found[0].log_answer == -np.inf and found[0].status == "ok"


def test_no_correct_trace_is_dropped():
    found = weigh([score(0, [-1], [-1], 0), score(1, [-1], [-1], 0)])
    assert [(row.weight, row.status) for row in found] == [(0.0, "no_correct_trace")] * 2


def test_no_correct_trace_falls_back_to_gold():
    found = weigh([score(0, [-1], [-1], 0)], on_no_correct_trace="gold")
    assert [(row.trace_index, row.weight, row.status) for row in found] == [
        (0, 0.0, "no_correct_trace"), (-1, 1.0, "gold")]  # fmt: skip


def test_no_correct_trace_falls_back_to_the_geometric_mean():
    scores = [score(0, [-1], [-1], 0, reference=[-1.0, -3.0]), score(1, [-1], [-1], 0, reference=[-1.0, -1.0])]
    found = weigh(scores, on_no_correct_trace="geometric_mean")
    assert [row.weight for row in found] == pytest.approx((np.exp([-2, -1]) / np.exp([-2, -1]).sum()).tolist())
    assert {row.status for row in found} == {"ok"}


def test_truncated_traces_are_left_out_whatever_their_scores():
    empty = np.zeros(0, np.float32)
    cut = Score("q", 1, 1, empty, empty, empty, None, None)
    found = weigh([score(0, [-1], [-1]), cut], [False, True])
    assert [(row.weight, row.status) for row in found] == [(1.0, "ok"), (0.0, "truncated")]


def test_weights_do_not_depend_on_the_order_of_traces():
    scores = random_scores(6)
    forward, backward = weigh(scores), weigh(scores[::-1])
    assert [row.weight for row in forward] == pytest.approx([row.weight for row in backward[::-1]], rel=1e-14)


def test_normalise_survives_extreme_log_weights_and_added_constants():
    values = np.array([-1e5, -1e5 + np.log(3), -np.inf])
    assert normalise(values).tolist() == pytest.approx([0.25, 0.75, 0.0], rel=1e-9)
    assert normalise(values + 2e5).tolist() == pytest.approx([0.25, 0.75, 0.0], rel=1e-9)
    assert normalise([-np.inf, -np.inf]).tolist() == [0.0, 0.0]


def test_effective_sample_size_of_equal_and_single_weights():
    assert effective_sample_size(np.full(8, 0.125)) == pytest.approx(8)
    assert effective_sample_size(np.array([1.0, 0, 0])) == 1


def test_posterior_weights_are_accuracies_without_a_ratio():
    found = weigh([score(0, [-9], [0], 1, 4), score(1, [0], [-9], 3, 4)], name="forward_kl")
    assert [row.weight for row in found] == pytest.approx([0.25, 0.75], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"num_answers": None}, {}, "verify"),
        ({"logp_answer": None}, {"answer": "likelihood"}, "logp_answer.*score stage"),
        ({"logp_posterior": None}, {}, "logp_posterior.*score stage"),
        ({"logp_posterior": np.zeros(3, np.float32)}, {}, "has 1 tokens, logp_posterior 3"),
        ({"logp_policy": np.array([np.nan], np.float32)}, {}, "not finite"),
    ],
)
def test_missing_or_broken_scores_are_refused_by_name(change, settings, message):
    with pytest.raises(ValueError, match=f"trace 0 of question 'q'.*{message}"):
        weigh([replace(score(0, [-1], [-1]), **change)], **settings)


def test_ratio_of_equal_models_is_zero():
    assert log_ratio(score(0, [-1.5, -2], [-1.5, -2]), "sequence") == 0.0


def rows(shares, question="q"):
    return [Weight(question, index, 1, 0.0, 0.0, 0.0, share, "ok") for index, share in enumerate(shares)]


def test_min_weight_drops_traces_and_reports_their_mass():
    kept, lost = select(rows([0.7, 0.2, 0.1]) + rows([1.0], "r"), "weighted", 0.15, 0)
    assert [row.weight for row in kept] == [0.7, 0.2, 1.0] and lost == pytest.approx(0.05)


def test_best_takes_the_largest_with_weight_one():
    kept, _ = select(rows([0.2, 0.5, 0.3]), "best", 0.0, 0)
    assert [(row.trace_index, row.weight) for row in kept] == [(1, 1.0)]


def test_resample_draws_by_weight_and_by_question_only():
    shares = [0.5, 0.3, 0.2]
    questions = [row for index in range(4000) for row in rows(shares, f"q{index}")]
    kept, _ = select(questions, "resample", 0.0, 7)
    counts = np.bincount([row.trace_index for row in kept], minlength=3) / 4000
    assert np.abs(counts - shares).max() < 0.025  # 3 standard deviations of a share of 0.5 at 4,000 draws
    assert {row.weight for row in kept} == {1.0}
    backwards, _ = select(questions[::-1], "resample", 0.0, 7)
    assert {(row.question_id, row.trace_index) for row in kept} == {
        (row.question_id, row.trace_index) for row in backwards}  # fmt: skip


def test_an_unknown_objective_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'nope'.*iwae"):
        get_objective("nope")
