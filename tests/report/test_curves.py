"""The numbers of the report against enumeration and hand arithmetic."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from helpers.small_run import (
    BASE,
    NUM_ANSWERS,
    NUM_CORRECT,
    NUM_TRACES,
    QUESTIONS,
    eval_answers,
    ids,
    make_run,
    round_records,
)
from tokenizers import Tokenizer

from megavar.config.schema import EvalConfig, ObjectiveConfig
from megavar.data.answer_in_trace import AnswerFinder
from megavar.objectives.importance import effective_sample_size, normalise
from megavar.record_files import read_records
from megavar.records import Score, Trace, Weight
from megavar.report import curves
from megavar.stages.weigh import weigh_traces


def rows_of(log_weights):
    """Scores and weights of one question a row; a trace is correct where its log-weight is finite."""
    scores, weights = [], []
    for question, row in enumerate(log_weights):
        for index, value in enumerate(row):
            key = (str(question), index, 1)
            scores.append(Score(*key, np.zeros(1), None, None, 1, int(np.isfinite(value))))
            numbers = (0.0, value, value, normalise(row)[index])
            weights.append(Weight(*key, *numbers, "ok" if np.isfinite(row).any() else "no_correct_trace"))
    return scores, weights


def test_fewer_traces_equals_the_mean_over_all_subsets():
    random = np.random.default_rng(0)
    log_weights = np.where(random.random((5, 6)) < 0.5, random.normal(size=(5, 6)), -np.inf)
    log_weights[0] = -np.inf
    found = curves.fewer_traces(*rows_of(log_weights), "iwae", seed=0)
    assert [point.num_traces for point in found] == [1, 2, 4, 6]
    for point in found:
        subsets = [row[list(chosen)] for row in log_weights for chosen in combinations(range(6), point.num_traces)]
        sizes = [effective_sample_size(normalise(subset)) for subset in subsets]
        with_weight = [np.isfinite(subset).any() for subset in subsets]
        assert point.correct == pytest.approx(np.mean(with_weight))
        assert point.ess == pytest.approx(np.sum(sizes) / np.sum(with_weight))


def test_all_traces_give_what_the_weigh_stage_reports(tmp_path):
    run = make_run(tmp_path)
    reported = curves.fewer_traces(
        round_records()[2], read_records(run.round / "weights" / "data.parquet", Weight), "iwae", seed=0
    )[-1]
    assert reported.num_traces == NUM_TRACES and reported.correct == 3 / 4
    # easy: exp(0, .1, .2, .3); mixed: two traces, 1:2 by accuracy and 1:exp(.1) by ratio; cut: one trace.
    easy, mixed = np.exp([0, 0.1, 0.2, 0.3]), np.array([1, 2 * np.exp(0.1)])
    expected = [easy.sum() ** 2 / (easy**2).sum(), mixed.sum() ** 2 / (mixed**2).sum(), 1.0]
    assert reported.ess == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize(("name", "sizes"), [("elbo", 3.75), ("reference_gml", 1.0), ("grpo", None)])
def test_other_objectives_have_the_size_of_their_own_weights_and_none_of_fewer_traces(tmp_path, name, sizes):
    traces, _, scores = round_records()
    config = ObjectiveConfig(
        train_answers="reference", answer_estimator="likelihood" if name == "elbo" else "accuracy", ratio="none"
    )
    logged = weigh_traces([(traces, scores)], name, config, tmp_path)
    weights = read_records(tmp_path / "data.parquet", Weight)
    *fewer, full = curves.fewer_traces(scores, weights, name, seed=0)
    assert full.ess == pytest.approx(logged["ess"]) and (sizes is None or full.ess == pytest.approx(sizes))
    assert len(fewer) == 2 and all(np.isnan(point.ess) for point in fewer)


def test_many_subsets_are_drawn_without_bias():
    random = np.random.default_rng(1)
    log_weights = random.normal(size=16)
    every = [effective_sample_size(np.exp(log_weights[list(chosen)])) for chosen in combinations(range(16), 4)]
    drawn = np.concatenate([curves.subset_ess(log_weights, 4, random) for _ in range(50)])
    assert len(drawn) == 50 * 128 and drawn.mean() == pytest.approx(np.mean(every), abs=4 * np.std(every) / 80)


def test_weights_too_small_for_floats_still_have_a_size():
    sizes = curves.subset_ess(np.array([-2000.0, -2000.0, -np.inf]), 2, np.random.default_rng(0))
    assert sizes.tolist() == [2.0, 1.0, 1.0]
    assert curves.subset_ess(np.full(2, -np.inf), 2, np.random.default_rng(0)).tolist() == [0.0]


@pytest.mark.parametrize(("largest", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_doublings_end_with_all_traces(largest, expected):
    assert curves.doublings(largest) == expected


def test_traces_that_were_not_weighed_do_not_count():
    scores, weights = rows_of([[-1.0, -2.0, -np.inf, -0.5]])
    unused = [*weights[:2], *(replace(row, status="unused") for row in weights[2:])]
    assert curves.fewer_traces(scores, unused, "iwae", seed=0) == curves.fewer_traces(
        scores[:2], weights[:2], "iwae", seed=0
    )


def test_gold_rows_are_no_sampled_traces():
    scores, weights = rows_of([[-np.inf, -np.inf]])
    gold = Weight("0", -1, 1, *[0.0] * 3, 1.0, "gold")
    (one, two) = curves.fewer_traces(scores, [*weights, gold], "iwae", seed=0)
    assert (one.correct, one.ess, two.ess) == (0, 0, 0)


def test_pass_curve_is_the_share_of_successful_subsets():
    answers = eval_answers({"easy": 3, "mixed": 1}, 3)
    found = curves.pass_curve(QUESTIONS, answers, EvalConfig(num_samples=3, num_bootstrap=50), seed=0)
    assert [point.k for point in found] == [1, 2, 3]
    assert [point.mean for point in found] == pytest.approx([(1 + 1 / 3) / 4, (1 + 2 / 3) / 4, 2 / 4])
    assert all(point.low <= point.mean <= point.high for point in found)


def test_a_long_pass_curve_has_at_most_64_points_with_both_ends():
    answers = eval_answers({"easy": 3}, 100)
    found = curves.pass_curve(QUESTIONS, answers, EvalConfig(num_samples=100, num_bootstrap=5), seed=0)
    assert len(found) == 64 and (found[0].k, found[-1].k) == (1, 100)


def test_implied_weights_are_those_of_the_unified_view():
    accuracies = np.array([0.0, 0.2, 0.5, 0.8, 1.0])
    iwae, rft, reinforce, grpo, f_grpo = ([weight(p) for p in accuracies] for weight in curves.IMPLIED_WEIGHTS.values())
    assert iwae == [1] * 5
    assert rft == reinforce == accuracies.tolist()
    assert grpo == pytest.approx([0, 0.5, 1, 2, 0])
    assert f_grpo == pytest.approx([0, 0.4, 0.5, 0.4, 0])


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 2.0, 0.5], [-3.0, 0.2, 1.0, 1.0]])
def test_implied_weights_scale_the_gradient_of_log_p_to_each_objective_s_own(logits):
    # A policy over four outcomes, the first two correct; d log p(outcome) / d logits = outcome - p.
    p = np.exp(logits) / np.exp(logits).sum()
    reward = np.array([1.0, 1.0, 0.0, 0.0])
    score = np.eye(4) - p
    accuracy = p @ reward
    log_p_gradient = (p * reward) @ score / accuracy
    advantage = (reward - accuracy) / np.sqrt(accuracy * (1 - accuracy))
    of_advantage = (p * advantage) @ score
    of_rewards = (p * reward) @ score
    gradients = [log_p_gradient, of_rewards, of_rewards, of_advantage, (1 - accuracy) * of_advantage]
    for weight, gradient in zip(curves.IMPLIED_WEIGHTS.values(), gradients, strict=True):
        assert weight(accuracy) * log_p_gradient == pytest.approx(gradient)


def test_densities_join_by_identity_and_leave_out_truncated_traces(tmp_path):
    run = make_run(tmp_path)
    traces, _, scores = round_records()
    weights = read_records(run.round / "weights" / "data.parquet", Weight)
    tokens, ratios = curves.ratios_by_length(traces[::-1], weights)
    assert len(tokens) == 15
    unused = [replace(row, status="unused") if row.trace_index else row for row in weights]
    assert len(curves.ratios_by_length(traces, unused)[0]) == 4
    assert ratios == pytest.approx(0.1 * (tokens - 3), abs=1e-6)
    answer_tokens, likelihoods = curves.likelihoods_by_length(scores)
    assert set(answer_tokens) == {2} and set(likelihoods) == {-3.0} and len(likelihoods) == 16


def test_leakage_is_joined_with_lengths_and_weights_and_truncated_traces_do_not_count(tmp_path):
    run = make_run(tmp_path)
    traces, _, scores = round_records()
    weights = read_records(run.round / "weights" / "data.parquet", Weight)
    found = curves.leakages(traces, scores, weights)
    weight_of = {(row.question_id, row.trace_index): row.weight for row in weights}
    said = [row for row in scores if row.leakage is not None]
    assert found.share == 11 / 15 and found.nats.tolist() == [0.5] * 11
    assert found.positions.tolist() == [1 / (3 + row.trace_index) for row in said]
    assert found.weights.tolist() == [weight_of[row.question_id, row.trace_index] for row in said]
    assert sum(found.weights) > 0
    assert curves.leakages(traces, [replace(row, answer_start=None) for row in scores], weights) is None


def test_leakage_of_rollouts_is_by_the_servers_log_probs_where_there_are_any():
    encode = Tokenizer.from_file(str(BASE / "tokenizer.json")).encode
    said = [
        ("3\n2\n", "closed", True),
        ("2\n3\n2\n", "closed", False),
        ("3\n22\n", "closed", True),
        ("2", "length", True),
    ]
    traces, weights = [], []
    for index, (text, finish, has_logps) in enumerate(said):
        tokens = ids(*encode(text, add_special_tokens=False).ids)
        logps = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        traces.append(Trace("easy", index, 1, "policy", ids(16), tokens, logps if has_logps else None, finish, index))
        weights.append(Weight("easy", index, 1, 0.0, 0.0, 0.0, 0.1 * index, "ok"))
    found = curves.rollout_leakages(traces, weights, QUESTIONS, AnswerFinder(BASE))
    assert found.share == 2 / 3 and found.weights.tolist() == [0.0, 0.1]
    assert found.positions.tolist() == [2 / 4, 0.0]  # 3, newline, 2, newline
    assert found.nats[0] == 3.0 and np.isnan(found.nats[1])
    assert curves.rollout_leakages(traces[2:], weights, QUESTIONS, AnswerFinder(BASE)) is None


def test_question_accuracies_count_missing_answers_as_wrong():
    answers = round_records()[1]
    found = curves.question_accuracies(answers, list(NUM_CORRECT), NUM_TRACES * NUM_ANSWERS)
    assert found.tolist() == [1.0, 3 / 8, 0.0, 1 / 8]


def test_bounds_are_of_all_traces_at_hand_and_say_where_a_truncated_one_leaves_a_question_out(tmp_path):
    traces, _, scores = round_records()
    found = weigh_traces([(traces, scores)], "iwae", ObjectiveConfig(num_traces=2), tmp_path)
    assert found["bound_4_questions"] == 3 and "bound_3_questions" not in found and "bound_5" not in found
    # Of each trace: log pi - log q = 0.1 index at each of its index + 3 tokens, and log pi(y'|x, z) = -3.
    log_rhos = np.array([0.1 * index * (index + 3) for index in range(4)]) - 3
    assert found["bound_4"] == pytest.approx(np.log(np.mean(np.exp(log_rhos))), rel=1e-5)
