"""Reads the questions of a run, JSONL or Parquet, and refuses what later stages would stumble over."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from megavar.records import Question, read_rows

_FIELDS = {item.name: item for item in fields(Question)}
_REQUIRED = [name for name, item in _FIELDS.items() if item.default is MISSING]


def read_questions(file: Path) -> list[Question]:
    """Read and check all questions of a file.

    Raises:
        ValueError: naming file, line (from 1) and field, for broken JSON, missing, unknown or empty fields, wrong
            types and ids that occur twice; for a missing or empty file.
    """
    if not file.is_file():
        raise ValueError(f"No question file {file}; give a .jsonl or .parquet file of questions.")
    questions: list[Question] = []
    line_of_id: dict[str, int] = {}
    for line, row in _rows(file):
        question = _check(row, f"{file}, line {line}")
        if question.id in line_of_id:
            raise ValueError(f"{file}, line {line}: id {question.id!r} is already on line {line_of_id[question.id]}.")
        line_of_id[question.id] = line
        questions.append(question)
    if not questions:
        raise ValueError(f"{file} holds no questions.")
    return questions


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix == ".parquet":
        yield from enumerate(read_rows(file), start=1)
        return
    # As bytes, so that a line that is not UTF-8 is named too, and a byte order mark is accepted.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: broken JSON ({error}).") from error


def _check(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the fields {', '.join(_FIELDS)}, got {row!r:.80}.")
    missing = [name for name in _REQUIRED if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing; needed are {', '.join(_REQUIRED)}.")
    unknown = sorted(row.keys() - _FIELDS.keys())
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}.")
    given = {name: value for name, value in row.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r} must be a string, got {value!r:.80}.")
        if not value.strip():
            raise ValueError(f"{where}: field {name!r} is empty; give a text or leave the field out.")
    return Question(**given)
