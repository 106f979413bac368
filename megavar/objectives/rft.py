"""Rejection-sampling finetuning as a weight on the same forward KL (docs/method.md, equation 10): P_ref a question.

On traces of the policy itself this is the usual RFT: each correct one counts 1 / K. It leans to easy questions.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import implied_weights
from megavar.records import Score, Weight


def question_weight(probability: float) -> float:
    """Weight of a question that the reference policy answers with this probability: the probability."""
    return probability


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Normalised weights of one question's traces times P_ref, in their order.

    Raises:
        ValueError: if a score lacks what the settings need, or the scores are not those of one question.
    """
    return implied_weights(scores, truncated, config, question_weight)


OBJECTIVE = Objective(weigh, weights_from_log_weights=True, implied_weight=ImpliedWeight("RFT: P_ref", question_weight))
