"""The selection of the paper's released scripts, by likelihood: one trace a question, mean answer log-prob + d.

d averages over the trace's tokens; traces of 28,000 tokens and more are left out. Weight 1, with the reference answer;
mix the gold data in with `policy.mix_gold=true`, as those scripts do.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import best_trace, check_traces, log_answer, log_ratio
from megavar.records import Score, Weight

LONGEST_TRACE = 28_000


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 for the best of one question's traces, 0 for the others, in their order; `config` changes nothing.

    Raises:
        ValueError: if a score lacks log-probs, or the scores are not those of one question.
    """
    check_traces(scores, truncated)
    left_out = [cut or len(score.logp_policy) >= LONGEST_TRACE for score, cut in zip(scores, truncated, strict=True)]
    ratios = [0.0 if out else log_ratio(score, "geometric_mean") for score, out in zip(scores, left_out, strict=True)]
    answers = [
        float("-inf") if out else log_answer(score, "geometric_mean")
        for score, out in zip(scores, left_out, strict=True)
    ]
    return best_trace(scores, truncated, ratios, answers)


OBJECTIVE = Objective(weigh, needs_reference_answer=True)
