"""Binary-reward REINFORCE as a weight on the same forward KL (docs/method.md, equation 11): P_theta for each question.

P_theta is taken where the traces were sampled. That is exact for the first step from the policy that sampled them
(`policy.init=sft`), where REINFORCE and RFT have one gradient, so the weights are RFT's; RFT trains from the base.
"""

from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.rft import question_weight, weigh

OBJECTIVE = Objective(
    weigh, weights_from_log_weights=True, implied_weight=ImpliedWeight("REINFORCE: P", question_weight)
)
