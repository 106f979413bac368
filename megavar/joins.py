"""Groups records by (question id, trace index); a duplicate record is an error that names it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from megavar.records import Answer, Score, Trace, Weight, identity

OUTPUTS_DO_NOT_MATCH = "docs/troubleshooting.md#outputs-do-not-match"
"""Where messages about records that do not join point to."""

Key = tuple[str, int]
"""(question id, trace index)."""
Row = TypeVar("Row", Trace, Score, Weight)


def by_trace(rows: Iterable[Row]) -> dict[Key, Row]:
    """Index rows by (question id, trace index).

    Raises:
        ValueError: naming a trace that occurs twice.
    """
    row_of: dict[Key, Row] = {}
    for row in rows:
        key = (row.question_id, row.trace_index)
        if key in row_of:
            raise ValueError(
                f"trace {key[1]} of question {key[0]!r} occurs twice; remove the stage's folder and "
                f"rerun it ({OUTPUTS_DO_NOT_MATCH})."
            )
        row_of[key] = row
    return row_of


def answers_by_trace(answers: Iterable[Answer]) -> dict[Key, list[Answer]]:
    """Group answers by (question id, trace index), sorted by answer index; an empty list for any other key.

    Raises:
        ValueError: naming an answer that occurs twice.
    """
    answers_of: dict[Key, list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda row: row.answer_index):
        group = answers_of[answer.question_id, answer.trace_index]
        if group and group[-1].answer_index == answer.answer_index:
            raise ValueError(
                f"answer {answer.answer_index} of trace {answer.trace_index} of question {answer.question_id!r} occurs "
                f"twice; remove the stage's folder and rerun it ({OUTPUTS_DO_NOT_MATCH})."
            )
        group.append(answer)
    return answers_of


def count_correct(answers: Sequence[Answer]) -> int:
    """Number of correct answers.

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


def check_complete(
    rows: Iterable[Trace | Answer | Score | Weight], expected: Iterable[tuple[str, int, int]], folder: Path
) -> None:
    """Count what a stage wrote against what it had to write, before it is marked finished.

    Args:
        rows: all records in `folder`.
        expected: `identity` of each record that there must be, once.

    Raises:
        ValueError: naming a record that is missing, or is there and should not be.
    """
    found, wanted = Counter(map(identity, rows)), set(expected)
    missing, others = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    doubled = [key for key, count in found.items() if count > 1]
    for keys, problem in ((missing, "lacks"), (others, "has, besides what belongs there,"), (doubled, "has twice")):
        if keys:
            question, trace, answer = keys[0]
            what = f"trace {trace} of question {question!r}" if answer < 0 else f"answer {answer} of its trace {trace}"
            of = "" if answer < 0 else f" of question {question!r}"
            raise ValueError(
                f"{folder} {problem} {what}{of} ({len(keys)} such records, {len(wanted)} belong there); run the same "
                f"command again, and if that does not help, remove {folder} ({OUTPUTS_DO_NOT_MATCH})."
            )
