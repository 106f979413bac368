"""GRPO's group-normalised reward as a question weight on the forward KL (docs/method.md, equation 12).

If all answers of a question are correct, or all are wrong, every advantage is 0 and so is its weight.
"""

from collections.abc import Sequence
from math import sqrt

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import implied_weights
from megavar.records import Score, Weight


def question_weight(probability: float) -> float:
    """sqrt(P / (1 - P)) for P = probability of a correct answer; 0 for P = 0 and P = 1."""
    return sqrt(probability / (1 - probability)) if 0 < probability < 1 else 0.0


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Normalised weights of one question's traces times sqrt(P / (1 - P)), in the order of `scores`.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    return implied_weights(scores, truncated, config, question_weight)


OBJECTIVE = Objective(
    weigh, compares_answers=True, implied_weight=ImpliedWeight("GRPO: sqrt(P / (1 - P))", question_weight)
)
