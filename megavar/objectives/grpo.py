"""GRPO's group-normalised reward as a weight on the same forward KL (docs/method.md, equation 12): sqrt(P / (1 - P)).

Questions that are always or never answered have no advantage, and no weight.
"""

from collections.abc import Sequence
from math import sqrt

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import implied_weights
from megavar.records import Score, Weight


def question_weight(probability: float) -> float:
    """Weight of a question that the policy answers with this probability; 0 at 0 and at 1."""
    return sqrt(probability / (1 - probability)) if 0 < probability < 1 else 0.0


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Normalised weights of one question's traces times sqrt(P / (1 - P)), in their order.

    Raises:
        ValueError: if a score lacks what the settings need, or the scores are not those of one question.
    """
    return implied_weights(scores, truncated, config, question_weight)


OBJECTIVE = Objective(
    weigh, compares_answers=True, implied_weight=ImpliedWeight("GRPO: sqrt(P / (1 - P))", question_weight)
)
