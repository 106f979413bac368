"""Reads and validates question files (JSONL or Parquet)."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from megavar.records import Question, read_rows

_FIELDS = {item.name: item for item in fields(Question)}
_REQUIRED = [name for name, item in _FIELDS.items() if item.default is MISSING]


def read_questions(file: Path) -> list[Question]:
    """Read and validate all questions of a file.

    Args:
        file: `.parquet`; any other suffix is read as JSONL.

    Raises:
        ValueError: if the file is missing or empty, or naming file, line (from 1) and field: invalid JSON, a missing,
            unknown or empty field, a value that is not a string, a duplicate id.
    """
    if not file.is_file():
        raise ValueError(f"No question file {file}; give a .jsonl or .parquet file.")
    questions: list[Question] = []
    line_of_id: dict[str, int] = {}
    for line, row in _rows(file):
        question = _check(row, f"{file}, line {line}")
        if question.id in line_of_id:
            raise ValueError(f"{file}, line {line}: id {question.id!r} was already on line {line_of_id[question.id]}.")
        line_of_id[question.id] = line
        questions.append(question)
    if not questions:
        raise ValueError(f"{file} contains no questions.")
    return questions


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix == ".parquet":
        yield from enumerate(read_rows(file), start=1)
        return
    # In binary mode: json detects the encoding, accepts a byte order mark, and invalid UTF-8 is reported by line.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: invalid JSON ({error}).") from error


def _check(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object with the fields {', '.join(_FIELDS)}, got {row!r:.80}.")
    missing = [name for name in _REQUIRED if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing; required are {', '.join(_REQUIRED)}.")
    unknown = sorted(row.keys() - _FIELDS.keys())
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; allowed are {', '.join(_FIELDS)}.")
    given = {name: value for name, value in row.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r} must be a string, got {value!r:.80}.")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(f"{where}: field {name!r} has half of a surrogate pair, which no text has; correct it.")
        if not value.strip():
            raise ValueError(f"{where}: field {name!r} is empty; give a text or omit the field.")
    return Question(**given)
