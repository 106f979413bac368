"""Joins records by (question id, trace index); a duplicate record is an error that names it.

Files of records are sorted by these, so several are read side by side, some questions at a time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megavar.record_files import RecordFile
from megavar.records import Answer, Score, Trace, Weight, identity_columns

OUTPUTS_DO_NOT_MATCH = "docs/troubleshooting.md#outputs-do-not-match"
"""Where messages about records that do not join point to."""

Key = tuple[str, int]
"""(question id, trace index)."""
Identity = tuple[str, int, int]
"""(question id, trace index, answer index); -1 for what a record does not have."""
Row = TypeVar("Row", Trace, Score, Weight)


def by_question(*files: RecordFile[Any]) -> Iterator[tuple[pa.Table, ...]]:
    """Read sorted files side by side, in tables of bounded size.

    Yields:
        One table a file: all rows of the next questions. Each question is in one tuple only.

    Raises:
        ValueError: if a file is not sorted.
    """
    streams = [_Stream(file) for file in files]
    while any(not stream.is_done for stream in streams):
        ends = [stream.last_question for stream in streams if not stream.is_read]
        if not ends:
            yield tuple(stream.take(len(stream.table)) for stream in streams)
            return
        end = min(ends)
        counts = [stream.num_before(end) for stream in streams]
        if any(counts):
            yield tuple(stream.take(count) for stream, count in zip(streams, counts, strict=True))
        for stream in streams:
            if not stream.is_read and stream.last_question == end:
                stream.read_more()


class _Stream:
    """The rows of a file that were read and not yet given away."""

    def __init__(self, file: RecordFile[Any]) -> None:
        self._file, self._tables = file, file.tables()
        self._order = [name for name in identity_columns(file.record_type) if name in file.columns]
        self.table = file.schema.empty_table()
        self.is_read = False
        self.read_more()

    @property
    def is_done(self) -> bool:
        return self.is_read and len(self.table) == 0

    @property
    def last_question(self) -> str:
        return str(self.table["question_id"][-1])

    def read_more(self) -> None:
        """Read the next table, at least one row."""
        for table in self._tables:
            if len(table):
                joined = pa.concat_tables([self.table, table]) if len(self.table) else table
                _require_order(joined, self._order, self._file.file)
                self.table = joined
                return
        self.is_read = True

    def num_before(self, question: str) -> int:
        """Rows of questions before this one."""
        return int(pc.sum(pc.less(self.table["question_id"], question)).as_py() or 0)

    def take(self, count: int) -> pa.Table:
        taken, self.table = self.table.slice(0, count), self.table.slice(count)
        return taken


def _require_order(table: pa.Table, names: Sequence[str], file: Path) -> None:
    """Refuse rows that do not ascend by these columns, the first of which matters most; equal rows may follow."""
    if len(table) < 2:
        return
    descends, tied = np.zeros(len(table) - 1, bool), np.ones(len(table) - 1, bool)
    for name in names:
        column = table[name].combine_chunks()
        before, after = column.slice(0, len(column) - 1), column.slice(1)
        descends |= tied & pc.greater(before, after).to_numpy(zero_copy_only=False)
        tied &= pc.equal(before, after).to_numpy(zero_copy_only=False)
    if descends.any():
        row = table.slice(int(descends.argmax()) + 1, 1).select(list(names)).to_pylist()[0]
        raise ValueError(
            f"{file} is not sorted by {', '.join(names)}: {row} follows a later row; it was changed since the stage "
            f"wrote it; remove it and run the same command again ({OUTPUTS_DO_NOT_MATCH})."
        )


def identities(file: RecordFile[Any]) -> Iterator[Identity]:
    """Of each row of a file, in its order."""
    for table in file.tables():
        names = [
            name if name in table.schema.names else None for name in ("question_id", "trace_index", "answer_index")
        ]
        columns = [[-1] * len(table) if name is None else table[name].to_pylist() for name in names]
        yield from zip(*columns, strict=True)


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


def check_complete(found: Iterable[Identity], expected: Iterable[Identity], folder: Path) -> None:
    """Count what a stage wrote against what it had to write, before it is marked finished.

    Args:
        found: of all records in `folder`, sorted.
        expected: of each record that there must be, once; sorted.

    Raises:
        ValueError: naming a record that is missing, or is there and should not be.
    """
    missing, other, doubled = _Wrong("lacks"), _Wrong("has, besides what belongs there,"), _Wrong("has twice")
    num_expected = 0
    runs = groupby(found)
    run = next(runs, None)
    for key in expected:
        num_expected += 1
        while run is not None and run[0] < key:
            other.add(run[0])
            run = next(runs, None)
        if run is None or run[0] != key:
            missing.add(key)
            continue
        if sum(1 for _ in run[1]) > 1:
            doubled.add(key)
        run = next(runs, None)
    while run is not None:
        other.add(run[0])
        run = next(runs, None)
    for wrong in (missing, other, doubled):
        if wrong.first is not None:
            question, trace, answer = wrong.first
            what = f"trace {trace} of question {question!r}" if answer < 0 else f"answer {answer} of its trace {trace}"
            of = "" if answer < 0 else f" of question {question!r}"
            raise ValueError(
                f"{folder} {wrong.problem} {what}{of} ({wrong.count} such records, {num_expected} belong there); run "
                f"the same command again, and if that does not help, remove {folder} ({OUTPUTS_DO_NOT_MATCH})."
            )


class _Wrong:
    """Records with one problem: the first, and their number."""

    def __init__(self, problem: str) -> None:
        self.problem, self.count = problem, 0
        self.first: Identity | None = None

    def add(self, key: Identity) -> None:
        self.first = self.first or key
        self.count += 1
