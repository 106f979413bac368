"""The one-trace bound's policy weights (docs/method.md, equation 2): the mean of the ELBO's gradients over K traces.

Every trace counts alike, however unlikely its answer: this is IWAE with K = 1, averaged. It takes an answer after every
trace, and so the reference answer (`objective.train_answers=reference`).
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import check_traces, log_answer, log_ratio, make_weights
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """1 / K for each of a question's K traces that are not truncated, in their order.

    Raises:
        ValueError: if a score lacks what the settings need, or the scores are not those of one question.
    """
    check_traces(scores, truncated)
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, config.ratio) for score, cut in pairs]
    answers = [float("-inf") if cut else log_answer(score, config.answer_estimator) for score, cut in pairs]
    return make_weights(scores, truncated, ratios, answers, shares=[0.0 if cut else 1.0 for cut in truncated])


OBJECTIVE = Objective(weigh, needs_reference_answer=True)
