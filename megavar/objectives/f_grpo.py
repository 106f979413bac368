"""GRPO's question weight times 1 - P: F-GRPO's focal factor (1 - P)^gamma at gamma = 1, arXiv:2602.06717.

Where `grpo` counts questions more the easier they are, this counts those most that are solved half of the time.
"""

from collections.abc import Sequence
from math import sqrt

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import implied_weights
from megavar.records import Score, Weight


def question_weight(probability: float) -> float:
    """(1 - P) sqrt(P / (1 - P)) = sqrt(P (1 - P)) for P = probability of a correct answer."""
    return sqrt(probability * (1 - probability))


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Normalised weights of one question's traces times sqrt(P (1 - P)), in the order of `scores`.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    return implied_weights(scores, truncated, config, question_weight)


OBJECTIVE = Objective(
    weigh, compares_answers=True, implied_weight=ImpliedWeight("F-GRPO: sqrt(P (1 - P))", question_weight)
)
