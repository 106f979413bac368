"""Best-trace selection of the paper's released scripts, accuracy variant: argmax of accuracy x exp(d), weight 1.

Candidates are traces of less than 28,000 tokens with a correct answer; a question without one trains on its gold
trace. Questions without a verifier are weighed by `reference_gml`. Set `policy.mix_gold=true` to mix in the gold data
as those scripts do.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import best_trace, check_traces, gold_weight, log_answer, log_ratio
from megavar.objectives.reference_gml import MAX_TRACE_TOKENS
from megavar.objectives.reference_gml import weigh as weigh_by_reference
from megavar.records import Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 for the best trace of one question, 0 for the others, in the order of `scores`; `config` is not used.

    If there is no candidate, a row for the gold trace is appended.

    Raises:
        ValueError: if log-probs or verified answers are missing, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    excluded = [cut or len(score.logp_policy) >= MAX_TRACE_TOKENS for score, cut in zip(scores, truncated, strict=True)]
    ratios = [0.0 if skip else log_ratio(score, "geometric_mean") for score, skip in zip(scores, excluded, strict=True)]
    answers = [
        float("-inf") if skip else log_answer(score, "accuracy") for score, skip in zip(scores, excluded, strict=True)
    ]
    weights = best_trace(scores, truncated, ratios, answers)
    return weights if any(row.weight for row in weights) else [*weights, gold_weight(scores[0])]


OBJECTIVE = Objective(weigh, needs_gold_traces=True, weigh_unverifiable=weigh_by_reference)
