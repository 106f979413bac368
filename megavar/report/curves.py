"""The numbers behind the report's figures, from records alone; `figures.py` draws them.

Estimates over fewer traces than were sampled are means over the subsets of the traces at hand, so they are unbiased.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from megavar.config.schema import EvalConfig
from megavar.evaluation.pass_at_k import Accuracy, accuracy, pass_at_k
from megavar.joins import by_trace
from megavar.objectives import OBJECTIVES
from megavar.objectives.importance import effective_sample_size
from megavar.records import Answer, Question, Score, Trace, Weight, WeightStatus

Floats = NDArray[np.float64]
_MOST_SUBSETS = 128
_MOST_POINTS = 64


@dataclass(frozen=True)
class FewerTraces:
    """What a round would have with `num_traces` traces a question instead of all."""

    num_traces: int
    correct: float
    """Share of questions with a correct trace among them."""
    ess: float
    """Mean effective sample size of the questions that have weights; 0 if none has. NaN where it cannot be told."""


def pass_curve(
    questions: Sequence[Question], answers: Sequence[Answer], config: EvalConfig, seed: int
) -> list[Accuracy]:
    """pass@k for k = 1..n with bootstrap intervals; 64 values of k, evenly spread, where n is larger."""
    n = config.num_samples
    points = np.unique(np.linspace(1, n, min(n, _MOST_POINTS)).round().astype(int)).tolist()
    return [accuracy(questions, answers, n, k, config.num_bootstrap, seed) for k in points]


def fewer_traces(scores: Sequence[Score], weights: Sequence[Weight], objective: str, seed: int) -> list[FewerTraces]:
    """The round with 1, 2, 4, ... and all of its traces a question.

    A trace is correct if one of its answers is. Sizes are means over all subsets, or over 128 drawn ones where there
    are more; with fewer than all traces they are told of objectives that share a question's weight by log-weights only.
    What a question without a correct trace falls back to is not counted.

    Args:
        scores: of every trace, with counted answers.
        weights: of the same traces; those of gold traces, and traces beyond `objective.num_traces`, are left out.
        objective: which made the weights.
    """
    weighed = {key: row for key, row in by_trace(weights).items() if _is_weighed(row)}
    num_correct: dict[str, list[int]] = defaultdict(list)
    for score in scores:
        if (score.question_id, score.trace_index) in weighed:
            num_correct[score.question_id].append(score.num_correct or 0)
    rows_of: dict[str, list[Weight]] = defaultdict(list)
    for row in weighed.values():
        rows_of[row.question_id].append(row)
    counts = [(len(group), sum(number > 0 for number in group)) for group in num_correct.values()]
    at_hand = min(size for size, _ in counts)
    random = np.random.default_rng(seed)
    points = []
    for k in doublings(at_hand):
        correct = np.mean([pass_at_k(size, found, k) for size, found in counts])
        sizes = _sizes_of(list(rows_of.values()), k, objective, random)
        points.append(FewerTraces(k, float(correct), float(sizes.sum() / max(np.count_nonzero(sizes), 1))))
    return points


def _sizes_of(groups: Sequence[Sequence[Weight]], k: int, objective: str, random: np.random.Generator) -> Floats:
    """Effective sample sizes of questions with `k` of their traces; one NaN where the weights do not tell them."""
    if all(len(group) == k for group in groups):
        shares = [np.array([abs(row.weight) if _is_ok(row) else 0.0 for row in group]) for group in groups]
        return np.array([effective_sample_size(group) for group in shares])
    if objective not in OBJECTIVES or not OBJECTIVES[objective].weights_from_log_weights:
        return np.full(1, np.nan)
    logs = [np.array([row.log_weight if _is_ok(row) else -np.inf for row in group]) for group in groups]
    return np.concatenate([subset_sizes(group, k, random) for group in logs])


def _is_weighed(row: Weight) -> bool:
    """Not a gold trace, and not beyond `objective.num_traces`."""
    return row.trace_index >= 0 and row.status != WeightStatus.UNUSED


def _is_ok(row: Weight) -> bool:
    return row.status == WeightStatus.OK


def doublings(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, which is always the last."""
    return [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]


def subset_sizes(log_weights: Floats, k: int, random: np.random.Generator) -> Floats:
    """Effective sample size of every subset of `k` of one question's traces; 0 where all its weights are 0.

    Args:
        log_weights: [K traces], unnormalised.
        random: draws 128 subsets where there are more.
    """
    total = len(log_weights)
    if comb(total, k) <= _MOST_SUBSETS:
        subsets = np.array(list(combinations(range(total), k)))
    else:
        subsets = random.permuted(np.tile(np.arange(total), (_MOST_SUBSETS, 1)), axis=1)[:, :k]
    chosen = log_weights[subsets]
    largest = chosen.max(1, keepdims=True)
    shares = np.exp(chosen - np.where(np.isfinite(largest), largest, 0.0))
    sizes: Floats = shares.sum(1) ** 2 / np.maximum((shares**2).sum(1), np.finfo(float).tiny)
    return sizes


def question_sizes(weights: Sequence[Weight]) -> dict[str, float]:
    """Effective sample size of every question; 0 for one without weights."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in weights:
        groups[row.question_id].append(row.weight)
    return {question_id: effective_sample_size(np.array(group)) for question_id, group in groups.items()}


def question_accuracies(answers: Sequence[Answer], question_ids: Sequence[str], num_answers: int) -> Floats:
    """[questions] share of correct answers among `num_answers`; a truncated trace has none, which count as wrong."""
    correct: dict[str, int] = defaultdict(int)
    for answer in answers:
        correct[answer.question_id] += bool(answer.correct)
    return np.array([correct[question_id] / num_answers for question_id in question_ids])


def ratios_by_length(traces: Sequence[Trace], weights: Sequence[Weight]) -> tuple[Floats, Floats]:
    """(tokens, log-ratio) of every closed trace that was weighed."""
    trace_of = by_trace(traces)
    kept = [row for row in weights if _is_weighed(row) and row.status != WeightStatus.TRUNCATED]
    tokens = [len(trace_of[row.question_id, row.trace_index].trace_ids) for row in kept]
    return np.array(tokens, float), np.array([row.log_ratio for row in kept], float)


def likelihoods_by_length(scores: Sequence[Score]) -> tuple[Floats, Floats]:
    """(tokens, log-likelihood) of the reference answer after every scored trace."""
    kept = [score.logp_answer for score in scores if score.logp_answer is not None]
    tokens = np.array([len(logps) for logps in kept], float)
    return tokens, np.array([logps.sum(dtype=np.float64) for logps in kept], float)


IMPLIED_WEIGHTS = {
    objective.implied_weight.label: objective.implied_weight.of_probability
    for objective in OBJECTIVES.values()
    if objective.implied_weight is not None
}
"""The weight each objective implies for a question of accuracy P (equations 10 to 12), RFT with P_ref = P."""
