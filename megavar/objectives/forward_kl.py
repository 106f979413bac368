"""Posterior training on policy rollouts, weighted by accuracy: w_m / sum_j w_j (docs/method.md, equation 9)."""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import check_traces, log_answer, make_weights
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weights of one question's rollouts, in the order of `scores`; `config` is not used.

    Raises:
        ValueError: if a closed trace has no verified answers, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    answers = [
        float("-inf") if cut else log_answer(score, "accuracy") for score, cut in zip(scores, truncated, strict=True)
    ]
    return make_weights(scores, truncated, [0.0] * len(scores), answers)


OBJECTIVE = Objective(weigh, posterior_source="rollout", weights_from_log_weights=True)
