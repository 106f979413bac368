"""The ELBO's own gradient for the posterior (docs/method.md, equation 2), by the score function with a baseline.

It fits q to the true posterior in the reverse KL, on q's own traces, and is there to show the collapse that the forward
KL avoids. Its weights have signs and sum to zero over a question.
"""

from collections.abc import Sequence

import numpy as np

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import check_traces, log_answer, log_ratio, make_weights
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """(f_k - mean of the others' f) / K for each of a question's K whole traces, in their order.

    f_k is the sum over the trace of log pi - log q, plus log a_k; the gradient sum_k weight_k grad log q(z_k) is then
    unbiased. A lone whole trace has no baseline, and so no weight. An accuracy of 0 of n would make f_k infinite:
    log a_k is that of (correct + 1/2) / (n + 1).

    Raises:
        ValueError: if a score lacks what the settings need, or the scores are not those of one question.
    """
    check_traces(scores, truncated)
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, "sequence") for score, cut in pairs]
    answers = [float("-inf") if cut else _log_answer(score, config.answer_estimator) for score, cut in pairs]
    whole = [index for index, cut in enumerate(truncated) if not cut]
    values = np.array([ratios[index] + answers[index] for index in whole])
    shares = np.zeros(len(scores))
    if len(whole) > 1:
        others = (values.sum() - values) / (len(whole) - 1)
        shares[whole] = (values - others) / len(whole)
    return make_weights(scores, truncated, ratios, answers, shares=shares.tolist(), normalised=False)


def _log_answer(score: Score, answer: str) -> float:
    if answer != "accuracy":
        return log_answer(score, answer)
    log_answer(score, answer)  # checks the counts
    assert score.num_answers is not None and score.num_correct is not None
    return float(np.log((score.num_correct + 0.5) / (score.num_answers + 1)))


OBJECTIVE = Objective(weigh, posterior_source="reverse_kl")
