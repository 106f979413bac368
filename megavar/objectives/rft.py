"""Rejection-sampling finetuning as a question weight on the forward KL (docs/method.md, equation 10): P_ref.

With traces sampled from the policy this is standard RFT: weight 1 / K per correct trace. It favours easy questions.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import implied_weights
from megavar.records import Score, Weight


def question_weight(probability: float) -> float:
    """P itself, for P = probability of a correct answer under the reference policy."""
    return probability


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Normalised weights of one question's traces times P_ref, in the order of `scores`.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    return implied_weights(scores, truncated, config, question_weight)


OBJECTIVE = Objective(weigh, weights_from_log_weights=True, implied_weight=ImpliedWeight("RFT: P_ref", question_weight))
