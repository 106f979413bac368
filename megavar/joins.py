"""Joins records by identity; a row that is missing or doubled is an error that names it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from megavar.records import Answer, Score, Trace, Weight

Key = tuple[str, int]
"""(question id, trace index)."""
Row = TypeVar("Row", Trace, Score, Weight)


def by_trace(rows: Iterable[Row]) -> dict[Key, Row]:
    """Rows by (question id, trace index).

    Raises:
        ValueError: naming an identity that occurs twice.
    """
    found: dict[Key, Row] = {}
    for row in rows:
        key = (row.question_id, row.trace_index)
        if key in found:
            raise ValueError(
                f"trace {key[1]} of question {key[0]!r} occurs twice; remove the stage's folder, rerun it."
            )
        found[key] = row
    return found


def answers_by_trace(answers: Iterable[Answer]) -> dict[Key, list[Answer]]:
    """Answers of each trace, in the order of their indices.

    Raises:
        ValueError: naming an identity that occurs twice.
    """
    found: dict[Key, list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda row: row.answer_index):
        group = found[answer.question_id, answer.trace_index]
        if group and group[-1].answer_index == answer.answer_index:
            raise ValueError(
                f"answer {answer.answer_index} of trace {answer.trace_index} of question {answer.question_id!r} occurs "
                "twice; remove the stage's folder, rerun it."
            )
        group.append(answer)
    return found


def count_correct(answers: Sequence[Answer]) -> int:
    """How many of a trace's or question's answers are correct.

    Raises:
        ValueError: naming an answer without a verdict.
    """
    for answer in answers:
        if answer.correct is None:
            raise ValueError(
                f"answer {answer.answer_index} of trace {answer.trace_index} of question {answer.question_id!r} has no "
                "verdict; run `megavar verify`."
            )
    return sum(bool(answer.correct) for answer in answers)
