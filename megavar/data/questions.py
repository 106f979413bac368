"""Reads and validates question files (JSONL or Parquet)."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from megavar.record_files import read_rows
from megavar.records import Question

_FIELDS = {item.name: item for item in fields(Question)}
MOST_SHOWN = 10
"""Bad rows that a message describes."""
_REQUIRED = [name for name, item in _FIELDS.items() if item.default is MISSING]


def read_questions(file: Path) -> list[Question]:
    """Read and validate all questions of a file.

    An answer that is all in one \\boxed{...} is read without it: templates put their own around it.

    Args:
        file: `.parquet`; any other suffix is read as JSONL.

    Raises:
        ValueError: if the file is missing or empty, or naming file, line (from 1), id and field of up to ten bad rows
            with their number: invalid JSON, a key twice, a missing, unknown or empty field, a value that is not a
            string, a duplicate id.
    """
    if not file.is_file():
        raise ValueError(f"No question file {file}; give a .jsonl or .parquet file.")
    questions: list[Question] = []
    line_of_id: dict[str, int] = {}
    problems = Problems(file)
    for line, row in _rows(file):
        try:
            question = _check(row)
            if question.id in line_of_id:
                raise ValueError(f"id {question.id!r} was already on line {line_of_id[question.id]}.")
        except ValueError as error:
            problems.add("cannot be read", line, str(error))
            continue
        line_of_id[question.id] = line
        questions.append(question)
    problems.refuse(len(questions) + len(problems))
    if not questions:
        raise ValueError(f"{file} contains no questions.")
    return questions


class Problems:
    """Rows of a question file that cannot be used.

    Args:
        file: that they are in.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._counts: Counter[str] = Counter()
        self._shown: list[str] = []

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, kind: str, place: int | Question, description: str) -> None:
        """Count a row.

        Args:
            kind: completes "3 rows ...".
            place: its line, from 1, or the question that was read from it.
        """
        self._counts[kind] += 1
        if len(self._shown) < MOST_SHOWN:
            line = _line_of(self._file, place.id) if isinstance(place, Question) else place
            self._shown.append(f"line {line}: {description}")

    def summary(self, num_rows: int) -> str:
        """The only one, or the first ten and the numbers of each kind."""
        if len(self) == 1:
            return f"{self._file}, {self._shown[0]}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._counts.most_common())
        lines = "\n  ".join(self._shown)
        more = "" if len(self) <= MOST_SHOWN else f" The first {MOST_SHOWN} are shown."
        return f"{self._file}, {lines}\n{len(self)} of {num_rows} rows are bad: {kinds}.{more}"

    def refuse(self, num_rows: int, advice: str = "") -> None:
        """Raise ValueError with the summary and the advice, if there is any."""
        if self._counts:
            raise ValueError(self.summary(num_rows) + advice)


def _line_of(file: Path, question_id: str) -> int:
    """The line, or row, of a question that was read from a file, from 1."""
    return next(line for line, row in _rows(file) if isinstance(row, dict) and row.get("id") == question_id)


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line and row; the error, where a line is no JSON."""
    if file.suffix == ".parquet":
        yield from enumerate(read_rows(file), start=1)
        return
    # In binary mode: json detects the encoding, accepts a byte order mark, and invalid UTF-8 is reported by line.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, object_pairs_hook=_object)
            except ValueError as error:
                yield number, error


class _RowError(ValueError):
    """A row that is JSON, but no question."""


def _named(row: dict[str, Any]) -> str:
    return f" (id {row['id']!r:.80})" if isinstance(row.get("id"), str) else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RowError(f"key {key!r:.80} occurs twice; remove one of the two{_named(row)}.")
    return row


def _check(row: Any) -> Question:
    if isinstance(row, ValueError):
        raise row if isinstance(row, _RowError) else ValueError(f"invalid JSON ({row}).")
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object with the fields {', '.join(_FIELDS)}, got {row!r:.80}.")
    missing = [name for name in _REQUIRED if row.get(name) is None]
    if missing:
        raise ValueError(f"field {missing[0]!r} is missing; required are {', '.join(_REQUIRED)}{_named(row)}.")
    unknown = sorted(row.keys() - _FIELDS.keys())
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; allowed are {', '.join(_FIELDS)}{_named(row)}.")
    given = {name: value for name, value in row.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} must be a string, got {value!r:.80}{_named(row)}.")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(
                f"field {name!r} has half of a surrogate pair, which no text has; correct it{_named(row)}."
            )
        if not value.strip():
            raise ValueError(f"field {name!r} is empty; give a text or omit the field{_named(row)}.")
    return Question(**{**given, "answer": _unboxed(given["answer"])})


def _unboxed(answer: str) -> str:
    """What a box holds, if it is all of the answer and there is no other in it."""
    box = re.fullmatch(r"\s*\$?\s*\\boxed\s*\{(.*)\}\s*\$?\s*", answer, re.DOTALL)
    if box is None or "\\boxed" in box[1] or not box[1].strip():
        return answer
    depth = 0
    for char in re.sub(r"\\.", "", box[1], flags=re.DOTALL):
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return answer
    return answer if depth else box[1]
