"""Registry of the objectives: scores of one question's traces -> their weights."""

from collections.abc import Callable, Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives import (
    elbo,
    forward_kl,
    grpo,
    iwae,
    reference_acc,
    reference_gml,
    reinforce,
    reverse_kl,
    rft,
    sft,
)
from megavar.records import Score, Weight

Objective = Callable[[Sequence[Score], Sequence[bool], ObjectiveConfig], list[Weight]]
"""(scores, which traces are truncated, settings) -> one weight a trace, in the same order."""

OBJECTIVES: dict[str, Objective] = {
    "iwae": iwae.weigh,
    "elbo": elbo.weigh,
    "rft": rft.weigh,
    "reinforce": reinforce.weigh,
    "grpo": grpo.weigh,
    "sft": sft.weigh,
    "reference_gml": reference_gml.weigh,
    "reference_acc": reference_acc.weigh,
    "forward_kl": forward_kl.weigh,
    "reverse_kl": reverse_kl.weigh,
}


def get_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: listing the known ones.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r} is unknown; known are {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]
