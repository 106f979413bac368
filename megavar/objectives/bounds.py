"""Per-question diagnostics: estimates of the bounds L_1 to L_K, KL(q || pi), ESS and entropy of the weights.

The bounds are on log pi(y' | x), the log-likelihood of the reference answer, so log rho is finite for every trace.
L_1 <= L_K <= L_{K+1} <= log pi(y' | x) in expectation (docs/method.md, equation 5). The estimates are unbiased only if
traces are sampled and scored at the same temperature. Training does not use them.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from megavar.objectives.importance import check_traces, effective_sample_size, log_answer, log_ratio
from megavar.records import Bound, Score, Weight

MAX_SUBSETS = 2_000
"""If there are more subsets of K traces than this, a fixed random sample of this many is used."""


def log_mean_exp(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """log(mean(exp(values))) along `axis`, which is removed; `values` are finite."""
    largest: NDArray[np.float64] = values.max(axis, keepdims=True)
    log_means: NDArray[np.float64] = np.log(np.exp(values - largest).mean(axis)) + largest.squeeze(axis)
    return log_means


def multi_trace_bounds(log_rhos: NDArray[np.float64]) -> NDArray[np.float64]:
    """Estimate L_1 to L_n from n traces: L_K is the mean of `log_mean_exp` over the subsets of K traces (equation 5).

    Averaging over subsets keeps the estimate unbiased and independent of the order of the traces.

    Args:
        log_rhos: [n] log rho of each trace, nats.

    Returns:
        [n] float64, L_1 first, nats.
    """
    count = len(log_rhos)
    return np.array([log_mean_exp(log_rhos[_subsets(count, size)]).mean() for size in range(1, count + 1)])


@lru_cache(maxsize=256)
def _subsets(count: int, size: int) -> NDArray[np.int32]:
    """Trace indices [subsets, size]."""
    if comb(count, size) <= MAX_SUBSETS:
        return np.array(list(combinations(range(count), size)), np.int32)
    return np.random.default_rng(size).random((MAX_SUBSETS, count)).argsort(1)[:, :size].astype(np.int32)


def question_bounds(scores: Sequence[Score], truncated: Sequence[bool], weights: Sequence[Weight]) -> Bound | None:
    """Diagnostics of one question from its closed traces.

    Args:
        scores: of the question's traces, with `logp_posterior` and `logp_answer`.
        truncated: one flag per score.
        weights: the objective's weights of these traces; a gold trace's is ignored.

    Returns:
        None if no trace is closed and scored under the posterior, or a reference answer was not scored.

    Raises:
        ValueError: if log-probs are not finite, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    closed = [
        score for score, cut in zip(scores, truncated, strict=True) if not cut and score.logp_posterior is not None
    ]
    if not closed or any(score.logp_answer is None for score in closed):
        return None
    ratios = np.array([log_ratio(score, "sequence") for score in closed])
    answers = np.array([log_answer(score, "likelihood") for score in closed])
    means = np.array([log_ratio(score, "geometric_mean") for score in closed])
    mean_answers = np.array([log_answer(score, "geometric_mean") for score in closed])
    sampled = np.array([weight.weight for weight in weights if weight.trace_index >= 0])
    positive = sampled[sampled > 0] / max(sampled[sampled > 0].sum(), 1e-300)
    return Bound(
        question_id=closed[0].question_id,
        round=closed[0].round,
        num_traces=len(closed),
        bounds=multi_trace_bounds(ratios + answers).astype(np.float32),
        bounds_geometric_mean=multi_trace_bounds(means + mean_answers).astype(np.float32),
        kl_posterior_policy=float(-ratios.mean()),
        ess=effective_sample_size(np.abs(sampled)),
        weight_entropy=float(-(positive * np.log(positive)).sum()),
    )
