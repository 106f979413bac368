"""Log-weights and the choice of traces, against hand arithmetic."""

import numpy as np
import pytest
from helpers.made_scores import rows, score

from megavar.objectives.importance import effective_sample_size, log_answer, log_ratio, normalise, select


def test_log_ratio_by_hand():
    # Differences 1 and 2: their mean is 3/2, their sum 3.
    trace = score(0, [-1, -1], [-2, -3])
    assert [log_ratio(trace, kind) for kind in ("geometric_mean", "sequence", "none")] == [1.5, 3.0, 0.0]


def test_log_ratio_of_equal_models_is_zero():
    assert log_ratio(score(0, [-1.5, -2], [-1.5, -2]), "sequence") == 0.0


def test_log_ratio_sums_in_float64():
    # 2^-24 beside 1 is lost in float32: the sum of 1 + 1,000 of them would be 1.
    small = float(np.float32(2.0**-24))
    trace = score(0, [0.0] * 1001, [-1.0] + [-small] * 1000)
    assert log_ratio(trace, "sequence") == pytest.approx(1 + 1000 * small, rel=1e-14, abs=0)


def test_log_answer_by_hand():
    trace = score(0, [-1], [-1], 3, 4, reference=[-1, -2, -6])
    assert log_answer(trace, "accuracy") == pytest.approx(np.log(0.75), rel=1e-15)
    assert [log_answer(trace, kind) for kind in ("geometric_mean", "likelihood")] == [-3.0, -9.0]
    assert log_answer(score(0, [-1], [-1], 0, 4), "accuracy") == -np.inf


@pytest.mark.parametrize(("answers", "correct"), [(0, 0), (2, 3), (2, -1)])
def test_impossible_counts_are_refused(answers, correct):
    with pytest.raises(
        ValueError, match=rf"trace 0 of question 'q' has num_correct={correct} of num_answers={answers}"
    ):
        log_answer(score(0, [-1], [-1], correct, answers), "accuracy")


def test_unknown_kinds_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"objective.ratio='mean'.*geometric_mean, sequence, none"):
        log_ratio(score(0, [-1], [-1]), "mean")
    with pytest.raises(ValueError, match=r"objective.answer_estimator='f1'.*accuracy, geometric_mean, likelihood"):
        log_answer(score(0, [-1], [-1]), "f1")
    with pytest.raises(ValueError, match=r"objective.selection='all'.*weighted, resample, best"):
        select(rows([1.0]), "all", 0.0, 0)


def test_normalise_survives_extreme_log_weights_and_added_constants():
    values = np.array([-1e5, -1e5 + np.log(3), -np.inf])
    assert normalise(values).tolist() == pytest.approx([0.25, 0.75, 0.0], rel=1e-9)
    assert normalise(values + 2e5).tolist() == pytest.approx([0.25, 0.75, 0.0], rel=1e-9)
    assert normalise([0.0, -1e5]).tolist() == [1.0, 0.0]


def test_normalise_of_nothing_is_zero():
    assert normalise([-np.inf, -np.inf]).tolist() == [0.0, 0.0]
    assert normalise([]).tolist() == []
    assert normalise([-7.0]).dtype == np.float64


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_normalise_refuses_broken_log_weights(broken):
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        normalise([0.0, broken])


def test_effective_sample_size_by_hand():
    assert effective_sample_size(np.full(8, 0.125)) == pytest.approx(8)
    assert effective_sample_size(np.array([1.0, 0, 0])) == 1
    assert effective_sample_size(np.array([0.5, 0.25, 0.25])) == pytest.approx(8 / 3)  # 1 / (1/4 + 1/16 + 1/16)
    assert effective_sample_size(np.array([1e-200, 1e-200])) == 2
    assert effective_sample_size(np.zeros(3)) == 0


def test_min_weight_drops_traces_reports_their_mass_and_leaves_the_rest_alone():
    kept, lost = select(rows([0.7, 0.2, 0.1]) + rows([1.0], "r"), "weighted", 0.15, 0)
    assert [row.weight for row in kept] == [0.7, 0.2, 1.0] and lost == pytest.approx(0.05)


def test_traces_without_weight_are_never_chosen():
    for selection in ("weighted", "resample", "best"):
        kept, lost = select(rows([0.0, 1.0]) + rows([0.0, 0.0], "r"), selection, 0.0, 3)
        assert [(row.question_id, row.trace_index) for row in kept] == [("q", 1)] and lost == 0
    assert select([], "weighted", 0.5, 3) == ([], 0.0)


def test_best_takes_the_largest_with_weight_one():
    kept, _ = select(rows([0.2, 0.5, 0.3]), "best", 0.0, 0)
    assert [(row.trace_index, row.weight) for row in kept] == [(1, 1.0)]


def test_resample_draws_by_weight_and_by_seed_and_question_only():
    shares = [0.5, 0.3, 0.2]
    questions = [row for index in range(4000) for row in rows(shares, f"q{index}")]
    kept, _ = select(questions, "resample", 0.0, 7)
    counts = np.bincount([row.trace_index for row in kept], minlength=3) / 4000
    assert np.abs(counts - shares).max() < 0.025  # 3 standard deviations of a share of 0.5 at 4,000 draws
    assert {row.weight for row in kept} == {1.0}
    assert select(questions[::-1], "resample", 0.0, 7)[0] == kept
    assert select(questions[:30], "resample", 0.0, 7)[0] == [row for row in kept if int(row.question_id[1:]) < 10]
    assert select(questions, "resample", 0.0, 8)[0] != kept
