"""The selection of the paper's released scripts, by accuracy: one trace a question, accuracy x exp(d).

Only traces with a correct answer and of less than 28,000 tokens are candidates; without one the question's gold trace
is trained on. Weight 1; mix the gold data in with `policy.mix_gold=true`, as those scripts do. (They fall back to
`reference_gml` for sources without a rule verifier; here every question has one.)
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import best_trace, check_traces, gold_weight, log_answer, log_ratio
from megavar.objectives.reference_gml import LONGEST_TRACE
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 for the best of one question's traces, 0 for the others, in their order; `config` changes nothing.

    Without a candidate there is a last row for the gold trace.

    Raises:
        ValueError: if a score lacks log-probs or counted answers, or the scores are not those of one question.
    """
    check_traces(scores, truncated)
    left_out = [cut or len(score.logp_policy) >= LONGEST_TRACE for score, cut in zip(scores, truncated, strict=True)]
    ratios = [0.0 if out else log_ratio(score, "geometric_mean") for score, out in zip(scores, left_out, strict=True)]
    answers = [
        float("-inf") if out else log_answer(score, "accuracy") for score, out in zip(scores, left_out, strict=True)
    ]
    weights = best_trace(scores, truncated, ratios, answers)
    return weights if any(row.weight for row in weights) else [*weights, gold_weight(scores[0])]


OBJECTIVE = Objective(weigh, needs_gold_traces=True)
