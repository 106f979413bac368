"""The `Objective` record: a function from one question's scores to its trace weights, plus its requirements.

Validation, stages and report read this record, so none of them refers to an objective by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megavar.config.schema import ObjectiveConfig
from megavar.records import Score, Weight

Weigh = Callable[[Sequence[Score], Sequence[bool], ObjectiveConfig], list[Weight]]
"""(scores of one question's K traces, K truncated flags, settings) -> one weight per trace, in the same order.

Runs on rank 0. May append a weight with trace index -1: it trains on the question's gold trace."""


@dataclass(frozen=True)
class ImpliedWeight:
    """Weight of a question as a function of P, the policy's probability of a correct answer (equations 10 to 12)."""

    label: str
    """Legend entry in the report."""
    of_probability: Callable[[float], float]
    """P in [0, 1] -> weight relative to forward KL, which is 1 for every question."""


@dataclass(frozen=True)
class Objective:
    """An objective and its requirements."""

    weigh: Weigh
    posterior_source: str | None = None
    """For objectives that train the posterior: the value of `posterior.source` that selects this one."""
    needs_reference_answer: bool = False
    """Gives weight to traces without a correct answer, so `objective.train_answers` must be `reference`."""
    needs_gold_traces: bool = False
    """May fall back to a question's gold trace."""
    has_fallback: bool = False
    """Implements `objective.on_no_correct_trace`."""
    compares_answers: bool = False
    """Needs at least two answers per question."""
    weights_from_log_weights: bool = False
    """Weights are proportional to exp(log_weight) within a question, so the weights of any subset of its traces follow
    from the records."""
    weigh_unverifiable: Weigh | None = None
    """For questions without a verifier; None: `importance.weigh_by_reference` with the accuracy estimator, `weigh` with
    the two that need no verdict."""
    implied_weight: ImpliedWeight | None = None
    """Plotted in the report; None: not plotted."""
