"""Policy weights of the multi-trace (IWAE) bound: rho_k / sum_j rho_j (docs/method.md, equations 5, 6 and 8)."""

from collections.abc import Sequence
from dataclasses import replace

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import ImpliedWeight, Objective
from megavar.objectives.importance import check_traces, gold_weight, log_answer, log_ratio, make_weights
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
    weights = _importance_weights(scores, truncated, config.ratio, config.answer_estimator)
    if any(weight.weight > 0 for weight in weights) or config.on_no_correct_trace == "drop":
        return weights
    if config.on_no_correct_trace == "geometric_mean":
        fallback = _importance_weights(scores, truncated, config.ratio, "geometric_mean")
        return [
            replace(row, status=WeightStatus.NO_CORRECT_TRACE) if row.status == WeightStatus.OK else row
            for row in fallback
        ]
    return [*weights, gold_weight(scores[0])]


def _importance_weights(
    scores: Sequence[Score], truncated: Sequence[bool], ratio: str, answer_estimator: str
) -> list[Weight]:
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, ratio) for score, cut in pairs]
    answers = [float("-inf") if cut else log_answer(score, answer_estimator) for score, cut in pairs]
    return make_weights(scores, truncated, ratios, answers)


OBJECTIVE = Objective(
    weigh,
    has_fallback=True,
    weights_from_log_weights=True,
    implied_weight=ImpliedWeight("IWAE, forward KL: 1", lambda probability: 1.0),
)
