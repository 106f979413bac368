"""Policy weights of the multi-trace (IWAE) bound: rho_k / sum_j rho_j (docs/method.md, equations 5, 6 and 8)."""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import check_traces, gold_weight, importance_weights, weigh_by_reference
from megavar.records import Score, Weight, WeightStatus


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Self-normalised importance weights of one question's traces, in the order of `scores`.

    If no trace has weight, `config.on_no_correct_trace` applies:
        drop: the weights stay 0.
        geometric_mean: recompute with `answer_estimator=geometric_mean`. The status stays `no_correct_trace`, so
            training uses the reference answer.
        gold: append a row with trace index -1 and weight 1, which trains on the data set's trace.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    weights = importance_weights(scores, truncated, config.ratio, config.answer_estimator)
    if any(weight.weight > 0 for weight in weights) or config.on_no_correct_trace == "drop":
        return weights
    if config.on_no_correct_trace == "geometric_mean":
        return weigh_by_reference(scores, truncated, config, WeightStatus.NO_CORRECT_TRACE)
    return [*weights, gold_weight(scores[0])]


OBJECTIVE = Objective(
    weigh,
    has_fallback=True,
    weights_from_log_weights=True,
    implied_weight=ImpliedWeight("IWAE, forward KL: 1", lambda probability: 1.0),
)
