"""Best-trace selection of the paper's released scripts, GML variant: argmax of mean answer log-prob + d, weight 1.

d is the mean log-ratio over the tokens of the trace. Traces of 28,000 tokens or more are excluded. Trains on the
reference answer; set `policy.mix_gold=true` to mix in the gold data as those scripts do.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import best_trace, check_traces, log_answer, log_ratio
from megavar.records import Score, Weight

MAX_TRACE_TOKENS = 28_000
"""Exclusive."""


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 for the best trace of one question, 0 for the others, in the order of `scores`; `config` is not used.

    Raises:
        ValueError: if log-probs are missing, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    excluded = [cut or len(score.logp_policy) >= MAX_TRACE_TOKENS for score, cut in zip(scores, truncated, strict=True)]
    ratios = [0.0 if skip else log_ratio(score, "geometric_mean") for score, skip in zip(scores, excluded, strict=True)]
    answers = [
        float("-inf") if skip else log_answer(score, "geometric_mean")
        for score, skip in zip(scores, excluded, strict=True)
    ]
    return best_trace(scores, truncated, ratios, answers)


OBJECTIVE = Objective(weigh, needs_reference_answer=True, weigh_unverifiable=weigh)
