"""Supervised finetuning on all closed traces, correct or not: the unweighted baseline.

Unlike the other objectives, the weights of a question sum to its number of closed traces, not to 1.
"""

from collections.abc import Sequence

from megavar.config.schema import ObjectiveConfig
from megavar.objectives.base import Objective
from megavar.objectives.importance import check_traces
from megavar.records import Score, Weight, WeightStatus


def weigh(scores: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig) -> list[Weight]:
    """Weight 1 for each closed trace of one question, in the order of `scores`; `config` is not used.

    Raises:
        ValueError: if the scores belong to several questions.
    """
    check_traces(scores, truncated)
    return [_weight(score, cut) for score, cut in zip(scores, truncated, strict=True)]


def _weight(score: Score, cut: bool) -> Weight:
    log_answer, weight = (float("-inf"), 0.0) if cut else (0.0, 1.0)
    status = WeightStatus.TRUNCATED if cut else WeightStatus.OK
    return Weight(score.question_id, score.trace_index, score.round, 0.0, log_answer, log_answer, weight, status)


OBJECTIVE = Objective(weigh, needs_reference_answer=True, weigh_unverifiable=weigh)
