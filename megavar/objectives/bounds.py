"""Per-question diagnostics: estimates of the bounds L_1 to L_K, KL(q || pi), ESS and entropy of the weights.

The bounds are on log pi(y' | x), the log-likelihood of the reference answer, so log rho is finite for every trace.
L_1 <= L_K <= L_{K+1} <= log pi(y' | x) in expectation (docs/method.md, equation 5). The estimates are unbiased only if
traces are sampled and scored at the same temperature. Training does not use them. All questions are computed together.

Shape suffixes: Q questions, T traces of all questions, n closed traces of a question, M subsets of these.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megavar.objectives.importance import check_traces, effective_sample_size, log_answer, log_ratio
from megavar.records import Bound, LogProbs, Score, Weight

MOST_EXACT = 16
"""Traces of a question, up to which all subsets are taken; beyond, a fixed random sample of each size."""
SAMPLED_SUBSETS = 2_000
_VALUES_AT_ONCE = 2**24

Floats = NDArray[np.float64]


def multi_trace_bounds(log_rhos: Floats) -> Floats:
    """Estimate L_1 to L_n from n traces of each question: L_K is the mean over the subsets of K traces (equation 5).

    Averaging over subsets keeps the estimate unbiased and independent of the order of the traces.

    Args:
        log_rhos: [Q, n] log rho of each trace, nats, finite.

    Returns:
        [Q, n] float64, L_1 first, nats.
    """
    num_questions, num_traces = log_rhos.shape
    of_chunk = _all_subsets if num_traces <= MOST_EXACT else _sampled_subsets
    at_once = max(1, _VALUES_AT_ONCE // min(2**num_traces, SAMPLED_SUBSETS * num_traces))
    chunks = [of_chunk(log_rhos[start : start + at_once]) for start in range(0, num_questions, at_once)]
    return np.concatenate(chunks)


def _all_subsets(log_rhos_Qn: Floats) -> Floats:
    """The subsets of the first traces, and those with one more trace: log(e^a + e^b) for each new one."""
    num_questions, num_traces = log_rhos_Qn.shape
    sums_QM = np.full((num_questions, 2**num_traces), -np.inf)  # of subset M, whose bits are its traces
    sizes_M = np.zeros(2**num_traces, np.int64)
    for trace in range(num_traces):
        without, with_it = slice(0, 2**trace), slice(2**trace, 2 ** (trace + 1))
        sums_QM[:, with_it] = np.logaddexp(sums_QM[:, without], log_rhos_Qn[:, trace, None])
        sizes_M[with_it] = sizes_M[without] + 1
    bounds = [sums_QM[:, sizes_M == size].mean(1) - np.log(size) for size in range(1, num_traces + 1)]
    return np.stack(bounds, axis=1)


def _sampled_subsets(log_rhos_Qn: Floats) -> Floats:
    num_traces = log_rhos_Qn.shape[1]
    bounds = []
    for size in range(1, num_traces + 1):
        if size in (1, num_traces):
            subsets = np.arange(num_traces)[:, None] if size == 1 else np.arange(num_traces)[None]
        else:
            random = np.random.default_rng(size).random((SAMPLED_SUBSETS, num_traces))
            subsets = random.argsort(1)[:, :size]
        bounds.append(np.logaddexp.reduce(log_rhos_Qn[:, subsets], axis=2).mean(1) - np.log(size))
    return np.stack(bounds, axis=1)


def estimate_bounds(
    questions: Sequence[Sequence[Score]], truncated: Sequence[Sequence[bool]], weights: Sequence[Sequence[Weight]]
) -> list[Bound]:
    """Diagnostics of the questions that have a closed trace which is scored under the posterior and with its answer.

    Args:
        questions: scores of each question's traces, with `logp_posterior` and `logp_answer`.
        truncated: one flag per score.
        weights: the objective's weights of these traces; a gold trace's is ignored.

    Raises:
        ValueError: if log-probs are not finite, or scores of a group belong to several questions.
    """
    closed_of: list[tuple[list[Score], Sequence[Weight]]] = []
    for scores, cuts, group_weights in zip(questions, truncated, weights, strict=True):
        check_traces(scores, cuts)
        closed = [
            score for score, cut in zip(scores, cuts, strict=True) if not cut and score.logp_posterior is not None
        ]
        if closed and all(score.logp_answer is not None for score in closed):
            closed_of.append((closed, group_weights))
    traces = [score for closed, _ in closed_of for score in closed]
    if not traces:
        return []
    ratios_T, mean_ratios_T = _sums_and_means(traces, of_answer=False)
    answers_T, mean_answers_T = _sums_and_means(traces, of_answer=True)
    starts = np.cumsum([0, *(len(closed) for closed, _ in closed_of)])
    of_count: dict[int, list[int]] = defaultdict(list)
    for index, (closed, _) in enumerate(closed_of):
        of_count[len(closed)].append(index)
    found: dict[int, tuple[LogProbs, LogProbs]] = {}
    for count, indices in of_count.items():
        columns = starts[indices][:, None] + np.arange(count)
        bounds = multi_trace_bounds((ratios_T + answers_T)[columns]).astype(np.float32)
        means = multi_trace_bounds((mean_ratios_T + mean_answers_T)[columns]).astype(np.float32)
        found.update(zip(indices, zip(bounds, means, strict=True), strict=True))
    kls = -np.add.reduceat(ratios_T, starts[:-1]) / np.diff(starts)
    return [
        _bound(closed, group_weights, found[index], float(kls[index]))
        for index, (closed, group_weights) in enumerate(closed_of)
    ]


def _sums_and_means(traces: Sequence[Score], of_answer: bool) -> tuple[Floats, Floats]:
    """[T] sums and means over the tokens: of log pi - log q of the traces, or of log pi of the reference answers."""
    chosen = [score.logp_answer if of_answer else score.logp_policy for score in traces]
    given = [logps for logps in chosen if logps is not None and len(logps)]
    if len(given) < len(traces):
        _name_the_wrong_one(traces)
    lengths = np.array([len(logps) for logps in given])
    values = np.concatenate(given, dtype=np.float64)
    if not of_answer:
        posterior = [score.logp_posterior for score in traces if score.logp_posterior is not None]
        if [len(logps) for logps in posterior] != lengths.tolist():
            _name_the_wrong_one(traces)
        values -= np.concatenate(posterior, dtype=np.float64)
    sums: Floats = np.add.reduceat(values, np.cumsum(lengths) - lengths)
    if not np.isfinite(sums).all():
        _name_the_wrong_one(traces)
    return sums, sums / lengths


def _name_the_wrong_one(traces: Sequence[Score]) -> None:
    """Raise ValueError for the first trace whose log-probs are missing, not finite or of unequal length."""
    for score in traces:
        log_ratio(score, "sequence")
        log_answer(score, "likelihood")


def _bound(closed: Sequence[Score], weights: Sequence[Weight], bounds: tuple[LogProbs, LogProbs], kl: float) -> Bound:
    sampled = np.array([weight.weight for weight in weights if weight.trace_index >= 0])
    positive = sampled[sampled > 0] / max(sampled[sampled > 0].sum(), 1e-300)
    return Bound(
        question_id=closed[0].question_id,
        round=closed[0].round,
        num_traces=len(closed),
        bounds=bounds[0],
        bounds_geometric_mean=bounds[1],
        kl_posterior_policy=kl,
        ess=effective_sample_size(np.abs(sampled)),
        weight_entropy=float(-(positive * np.log(positive)).sum()),
    )
