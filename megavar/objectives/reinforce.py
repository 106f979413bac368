"""Binary-reward REINFORCE as a weight on the same forward KL (method.md, equation 11): P_theta for each question.

P_theta is taken where the traces were sampled. That is exact for the first step from the policy that sampled them
(`policy.init=sft`), where REINFORCE and RFT have one gradient; RFT trains from the base.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.weights import implied_weights
from megavar.records import Score, Weight


def question_weight(probability: float) -> float:
    """Weight of a question that the policy answers with this probability: the probability."""
    return probability


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Normalised weights of one question's traces times P_theta, in their order.

    Raises:
        ValueError: if a score lacks what the settings need, or the scores are not those of one question.
    """
    return implied_weights(scores, truncated, config, question_weight)
