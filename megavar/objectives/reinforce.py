"""Binary-reward REINFORCE as a question weight on the forward KL (docs/method.md, equation 11): P_theta.

P_theta is estimated once, under the policy that sampled the traces. With `policy.init=sft` it is exact at the first
step, where REINFORCE and RFT have the same gradient; hence the weights are RFT's. RFT itself trains from the base.
"""

from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.rft import question_weight, weigh

OBJECTIVE = Objective(
    weigh, weights_from_log_weights=True, implied_weight=ImpliedWeight("REINFORCE: P", question_weight)
)
