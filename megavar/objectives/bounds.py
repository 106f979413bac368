"""What the traces of a question say of the bounds themselves: L_1 to L_K, KL(q || pi), and how the weights spread.

The bounds are those on log pi(y' | x), the probability of the reference answer; so every trace has a finite log rho,
and L_1 <= L_K <= L_{K+1} <= log pi(y' | x) in expectation (docs/method.md, equation 5). They estimate what they say
where traces were sampled at the temperature they were scored at. Nothing here trains.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from megavar.objectives.importance import check_traces, effective_sample_size, log_answer, log_ratio
from megavar.records import Bound, Score, Weight

MOST_SUBSETS = 2_000
"""Subsets of K traces beyond which a fixed draw of that many stands for all."""


def log_mean_exp(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """log of the mean of exp(values)."""
    largest: NDArray[np.float64] = values.max(axis, keepdims=True)
    found: NDArray[np.float64] = np.log(np.exp(values - largest).mean(axis)) + largest.squeeze(axis)
    return found


def multi_trace_bounds(log_rhos: NDArray[np.float64]) -> NDArray[np.float64]:
    """Estimates of L_1 to L_n from n traces: for each K the mean over subsets of K of log mean exp.

    Using all subsets leaves the estimate unbiased and takes the order of the traces out of it.
    """
    count = len(log_rhos)
    return np.array([log_mean_exp(log_rhos[_subsets(count, size)]).mean() for size in range(1, count + 1)])


@lru_cache(maxsize=256)
def _subsets(count: int, size: int) -> NDArray[np.int32]:
    """Indices [subsets, size]."""
    if comb(count, size) <= MOST_SUBSETS:
        return np.array(list(combinations(range(count), size)), np.int32)
    return np.random.default_rng(size).random((MOST_SUBSETS, count)).argsort(1)[:, :size].astype(np.int32)


def question_bounds(scores: Sequence[Score], truncated: Sequence[bool], weights: Sequence[Weight]) -> Bound | None:
    """The bounds of one question by its traces that are not truncated; None if there is none, or none was scored.

    Raises:
        ValueError: if log-probs are broken, or the scores are not those of one question.
    """
    check_traces(scores, truncated)
    whole = [
        score for score, cut in zip(scores, truncated, strict=True) if not cut and score.logp_posterior is not None
    ]
    if not whole or any(score.logp_answer is None for score in whole):
        return None
    ratios = np.array([log_ratio(score, "sequence") for score in whole])
    answers = np.array([log_answer(score, "likelihood") for score in whole])
    means = np.array([log_ratio(score, "geometric_mean") for score in whole])
    mean_answers = np.array([log_answer(score, "geometric_mean") for score in whole])
    shares = np.array([weight.weight for weight in weights if weight.trace_index >= 0])
    positive = shares[shares > 0] / max(shares[shares > 0].sum(), 1e-300)
    return Bound(
        question_id=whole[0].question_id,
        round=whole[0].round,
        num_traces=len(whole),
        bounds=multi_trace_bounds(ratios + answers).astype(np.float32),
        bounds_geometric_mean=multi_trace_bounds(means + mean_answers).astype(np.float32),
        kl_posterior_policy=float(-ratios.mean()),
        ess=effective_sample_size(np.abs(shares)),
        weight_entropy=float(-(positive * np.log(positive)).sum()),
    )
