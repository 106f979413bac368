"""Posterior training by the ELBO gradient (docs/method.md, equation 2): score-function estimator with a baseline.

Minimises KL(q || true posterior) on traces sampled from q. Weights can be negative and sum to 0 over a question. They
are the gradient for one step from the q that sampled; under the many steps of a stage q collapses (docs/objectives.md,
reverse KL). It is here to show that, and is refused without `posterior.allow_collapse=true`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import check_traces, log_answer, log_ratio, make_weights
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """(f_k - mean of f over the other traces) / K for each of the K closed traces of one question.

    f_k = sum over the trace of (log pi - log q) + log a_k, which makes sum_k weight_k grad log q(z_k) unbiased (leave-
    one-out baseline). A single closed trace has no baseline and gets weight 0. Departure: accuracy a_k is smoothed to
    (num_correct + 1/2) / (num_answers + 1), since 0 correct answers would make f_k infinite.

    Returns:
        One weight per score, in the same order; 0 for truncated traces.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, "sequence") for score, cut in pairs]
    answers = [float("-inf") if cut else _smoothed_log_answer(score, config.answer_estimator) for score, cut in pairs]
    closed = [index for index, cut in enumerate(truncated) if not cut]
    values = np.array([ratios[index] + answers[index] for index in closed])
    weights = np.zeros(len(scores))
    if len(closed) > 1:
        baselines = (values.sum() - values) / (len(closed) - 1)
        weights[closed] = (values - baselines) / len(closed)
    return make_weights(scores, truncated, ratios, answers, raw_weights=weights.tolist(), normalised=False)


def weigh_by_reference(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """The same for a question without a verifier: a_k is the geometric mean of the reference answer."""
    return weigh(scores, truncated, replace(config, answer_estimator="geometric_mean"))


def _smoothed_log_answer(score: Score, estimator: str) -> float:
    if estimator != "accuracy":
        return log_answer(score, estimator)
    log_answer(score, estimator)  # validates the counts
    assert score.num_answers is not None and score.num_correct is not None
    return float(np.log((score.num_correct + 0.5) / (score.num_answers + 1)))


OBJECTIVE = Objective(weigh, posterior_source="reverse_kl", weigh_unverifiable=weigh_by_reference)
