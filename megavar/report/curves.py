"""Statistics for the report's figures, computed from records; `figures.py` plots them.

Estimates for fewer traces than were sampled are means over subsets of the sampled traces, and thus unbiased.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from megavar.config.schema import EvalConfig
from megavar.data.answer_in_trace import AnswerFinder, answer_to_find
from megavar.evaluation.pass_at_k import Accuracy, accuracy, pass_at_k
from megavar.joins import by_trace
from megavar.objectives import OBJECTIVES
from megavar.objectives.importance import effective_sample_size
from megavar.records import Answer, Question, Score, Trace, TraceFinish, Weight, WeightStatus

Floats = NDArray[np.float64]
_MAX_SUBSETS = 128
_MAX_POINTS = 64


@dataclass(frozen=True)
class FewerTraces:
    """Expected statistics of a round with only `num_traces` traces per question."""

    num_traces: int
    correct: float
    """Fraction of questions with a correct trace."""
    ess: float
    """Mean effective sample size of the questions with weights; 0 if none has weights, NaN if not computable."""


def pass_curve(
    questions: Sequence[Question], answers: Sequence[Answer], config: EvalConfig, seed: int
) -> list[Accuracy]:
    """pass@k for k = 1..n (n = eval.num_samples) with bootstrap intervals; at most 64 evenly spaced values of k."""
    n = config.num_samples
    points = np.unique(np.linspace(1, n, min(n, _MAX_POINTS)).round().astype(int)).tolist()
    return [accuracy(questions, answers, n, k, config.num_bootstrap, seed) for k in points]


def fewer_traces(scores: Sequence[Score], weights: Sequence[Weight], objective: str, seed: int) -> list[FewerTraces]:
    """Expected statistics of the round with 1, 2, 4, ... and all traces per question.

    A trace is correct if one of its answers is. ESS is averaged over all subsets of traces, or over 128 random ones if
    there are more. With fewer than all traces it is NaN unless the objective has `weights_from_log_weights`. Fallbacks
    for questions without a correct trace are ignored.

    Args:
        scores: of all traces, with `num_correct`.
        weights: of the same traces; gold traces and traces beyond `objective.num_traces` are ignored.
        objective: name of the objective that computed the weights.
        seed: of the random subsets.
    """
    weighted = {key: row for key, row in by_trace(weights).items() if _is_weighted(row)}
    num_correct: dict[str, list[int]] = defaultdict(list)
    for score in scores:
        if (score.question_id, score.trace_index) in weighted:
            num_correct[score.question_id].append(score.num_correct or 0)
    rows_of: dict[str, list[Weight]] = defaultdict(list)
    for row in weighted.values():
        rows_of[row.question_id].append(row)
    counts = [(len(group), sum(number > 0 for number in group)) for group in num_correct.values()]
    max_traces = min(num_traces for num_traces, _ in counts)
    random = np.random.default_rng(seed)
    points = []
    for k in doublings(max_traces):
        correct = np.mean([pass_at_k(num_traces, num_correct_traces, k) for num_traces, num_correct_traces in counts])
        ess = _ess_of(list(rows_of.values()), k, objective, random)
        points.append(FewerTraces(k, float(correct), float(ess.sum() / max(np.count_nonzero(ess), 1))))
    return points


def _ess_of(groups: Sequence[Sequence[Weight]], k: int, objective: str, random: np.random.Generator) -> Floats:
    """ESS of questions with `k` of their traces, one value per question and subset; [NaN] if not computable."""
    if all(len(group) == k for group in groups):
        magnitudes = [np.array([abs(row.weight) if _is_ok(row) else 0.0 for row in group]) for group in groups]
        return np.array([effective_sample_size(group) for group in magnitudes])
    if objective not in OBJECTIVES or not OBJECTIVES[objective].weights_from_log_weights:
        return np.full(1, np.nan)
    logs = [np.array([row.log_weight if _is_ok(row) else -np.inf for row in group]) for group in groups]
    return np.concatenate([subset_ess(group, k, random) for group in logs])


def _is_weighted(row: Weight) -> bool:
    """Neither a gold trace nor beyond `objective.num_traces`."""
    return row.trace_index >= 0 and row.status != WeightStatus.UNUSED


def _is_ok(row: Weight) -> bool:
    return row.status == WeightStatus.OK


def doublings(largest: int) -> list[int]:
    """[1, 2, 4, ..., largest]."""
    return [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]


def subset_ess(log_weights: Floats, k: int, random: np.random.Generator) -> Floats:
    """ESS of the subsets of `k` of one question's K traces; 0 for a subset whose weights are all 0.

    Args:
        log_weights: [K], unnormalised, nats.
        random: samples 128 subsets if there are more.

    Returns:
        [subsets].
    """
    total = len(log_weights)
    if comb(total, k) <= _MAX_SUBSETS:
        subsets = np.array(list(combinations(range(total), k)))
    else:
        subsets = random.permuted(np.tile(np.arange(total), (_MAX_SUBSETS, 1)), axis=1)[:, :k]
    chosen = log_weights[subsets]
    largest = chosen.max(1, keepdims=True)
    scaled = np.exp(chosen - np.where(np.isfinite(largest), largest, 0.0))
    ess: Floats = scaled.sum(1) ** 2 / np.maximum((scaled**2).sum(1), np.finfo(float).tiny)
    return ess


@dataclass(frozen=True)
class Leakages:
    """Where the traces of a model first say their question's answer, of those that do (docs/method.md#leakage)."""

    share: float
    """Of the closed traces: those that say it."""
    positions: Floats
    """[traces] part of the trace that stands before it, 0 to 1."""
    nats: Floats
    """[traces] leakage; NaN if nobody computed log-probs of the trace."""
    weights: Floats
    """[traces] weight in the loss."""


def leakages(traces: Sequence[Trace], scores: Sequence[Score], weights: Sequence[Weight]) -> Leakages | None:
    """Of the round's closed, weighted traces; None if none says its answer."""
    trace_of, weight_of = by_trace(traces), by_trace(weights)
    rows, num_closed = [], 0
    for score in scores:
        key = (score.question_id, score.trace_index)
        weight = weight_of[key]
        if _is_weighted(weight) and weight.status != WeightStatus.TRUNCATED:
            num_closed += 1
            if score.answer_start is not None and score.leakage is not None:
                rows.append((score.answer_start / len(trace_of[key].trace_ids), score.leakage, weight.weight))
    return Leakages(len(rows) / num_closed, *np.array(rows, float).T) if rows else None


def rollout_leakages(
    traces: Sequence[Trace], weights: Sequence[Weight], questions: Sequence[Question], finder: AnswerFinder
) -> Leakages | None:
    """The same of the policy's rollouts, which only the serving engine gave log-probs, and only some of them."""
    answer_of = {question.id: answer_to_find(question) for question in questions}
    weight_of = by_trace(weights)
    closed = [trace for trace in traces if trace.finish == TraceFinish.CLOSED]
    rows = []
    for trace in closed:
        if (span := finder.find(trace.trace_ids, answer_of[trace.question_id])) is not None:
            logps, weight = trace.logp_engine, weight_of[trace.question_id, trace.trace_index].weight
            nats = np.nan if logps is None else -logps[slice(*span)].sum(dtype=np.float64)
            rows.append((span[0] / len(trace.trace_ids), nats, weight))
    return Leakages(len(rows) / len(closed), *np.array(rows, float).T) if rows else None


def question_ess(weights: Sequence[Weight]) -> dict[str, float]:
    """Question id -> effective sample size of its weights; 0 if it has none."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in weights:
        groups[row.question_id].append(row.weight)
    return {question_id: effective_sample_size(np.array(group)) for question_id, group in groups.items()}


def question_accuracies(answers: Sequence[Answer], question_ids: Sequence[str], num_answers: int) -> Floats:
    """[questions] fraction of correct answers out of `num_answers`; missing ones (truncated traces) count as wrong."""
    correct: dict[str, int] = defaultdict(int)
    for answer in answers:
        correct[answer.question_id] += bool(answer.correct)
    return np.array([correct[question_id] / num_answers for question_id in question_ids])


def ratios_by_length(traces: Sequence[Trace], weights: Sequence[Weight]) -> tuple[Floats, Floats]:
    """([traces] tokens, [traces] log-ratio d_k) of all closed, weighted traces."""
    trace_of = by_trace(traces)
    kept = [row for row in weights if _is_weighted(row) and row.status != WeightStatus.TRUNCATED]
    tokens = [len(trace_of[row.question_id, row.trace_index].trace_ids) for row in kept]
    return np.array(tokens, float), np.array([row.log_ratio for row in kept], float)


def likelihoods_by_length(scores: Sequence[Score]) -> tuple[Floats, Floats]:
    """([traces] tokens, [traces] log-likelihood) of the reference answer after each scored trace."""
    kept = [score.logp_answer for score in scores if score.logp_answer is not None]
    tokens = np.array([len(logps) for logps in kept], float)
    return tokens, np.array([logps.sum(dtype=np.float64) for logps in kept], float)


IMPLIED_WEIGHTS = {
    objective.implied_weight.label: objective.implied_weight.of_probability
    for objective in OBJECTIVES.values()
    if objective.implied_weight is not None
}
"""Legend label -> implied weight of a question as a function of P (equations 10 to 12); for RFT, P_ref = P."""
