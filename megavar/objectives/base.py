"""What an objective is: a function from the scores of one question's traces to their weights, and what it needs.

The schema, the checks and the report ask this record; none of them knows an objective by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megavar.config.schema import ObjectiveConfig
from megavar.records import Score, Weight

Weigh = Callable[[Sequence[Score], Sequence[bool], ObjectiveConfig], list[Weight]]
"""(scores of one question, which of its traces are truncated, settings) -> one weight a trace, in the same order.

May append a weight with trace index -1, which stands for the question's gold trace."""


@dataclass(frozen=True)
class ImpliedWeight:
    """How much an objective counts a question that the policy answers with probability P (equations 10 to 12)."""

    label: str
    of_probability: Callable[[float], float]


@dataclass(frozen=True)
class Objective:
    """An objective and what it declares of itself."""

    weigh: Weigh
    posterior_source: str | None = None
    """Of an objective that trains the posterior: the value of `posterior.source` that chooses it."""
    needs_reference_answer: bool = False
    """Gives weight to traces without a correct answer, so `objective.train_answers` must be `reference`."""
    needs_gold_traces: bool = False
    """May fall back to a question's gold trace."""
    has_fallback: bool = False
    """Follows `objective.on_no_correct_trace`."""
    compares_answers: bool = False
    """Needs at least two answers a question."""
    weights_from_log_weights: bool = False
    """A question's weights are proportional to exp(log_weight), so those of fewer traces can be computed."""
    implied_weight: ImpliedWeight | None = None
    """Drawn in the report, if it has one."""
