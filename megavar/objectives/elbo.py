"""Policy weights of the ELBO (docs/method.md, equation 2): its gradient, averaged over K traces.

All traces have equal weight, however unlikely the answer: the average over K of IWAE with K = 1. Every trace needs an
answer to train on, so this objective uses the reference answer (`objective.train_answers=reference`).
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import check_traces, log_answer, log_ratio, make_weights
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 / K for each of the K closed traces of one question, in the order of `scores`.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, config.ratio) for score, cut in pairs]
    answers = [float("-inf") if cut else log_answer(score, config.answer_estimator) for score, cut in pairs]
    return make_weights(scores, truncated, ratios, answers, raw_weights=[0.0 if cut else 1.0 for cut in truncated])


OBJECTIVE = Objective(weigh, needs_reference_answer=True, weigh_unverifiable=weigh)
