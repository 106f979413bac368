"""Supervised finetuning on all traces alike, right or wrong: the baseline without any weighing.

Departs from the other objectives in that the weights of a question sum to its number of traces, not to one.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.weights import check_traces
from megavar.records import Float64, Score, Weight


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 for each trace of one question that is not truncated, in their order; `config` changes nothing here.

    Raises:
        ValueError: if the scores are not those of one question.
    """
    check_traces(scores, truncated)
    return [_weight(score, cut) for score, cut in zip(scores, truncated, strict=True)]


def _weight(score: Score, cut: bool) -> Weight:
    log_answer, weight = (Float64(float("-inf")), Float64(0.0)) if cut else (Float64(0.0), Float64(1.0))
    status = "truncated" if cut else "ok"
    return Weight(
        score.question_id, score.trace_index, score.round, Float64(0.0), log_answer, log_answer, weight, status
    )
