"""`megavar show`: prints a file of records, or the file and parts of a stage's folder, for a person at a terminal.

The type of record is told by the columns. Questions and traces, whose texts are long, are blocks with every field;
answers, scores and weights are rows of a table for each question, without what its head or its text says, and seeds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megavar.data.decode import Decoder, open_decoder
from megavar.data.questions import read_questions
from megavar.records import Answer, Bound, Question, Score, Trace, Weight, identity, read_records

RECORD_TYPES: tuple[type[Any], ...] = (Trace, Answer, Score, Weight, Bound)
_MOST_IDS = 8
_NOT_IN_TABLES = ("question_id", "round", "answer_ids", "seed")


def show(path: Path, limit: int, question_id: str | None, model: Path | None, console: Console) -> None:
    """Print the first `limit` records of a file or a stage's folder.

    Args:
        question_id: only its records, all of them.
        model: a folder whose tokenizer turns ids into text; without one, ids are counted and the ends shown.

    Raises:
        ValueError: if the path holds no records of ours, or none of that question.
    """
    if limit < 0:
        raise ValueError(f"--limit {limit} is negative; give the number of records to print.")
    decode = open_decoder(model) if model else None
    records = read_any(path)
    groups: dict[str, list[Any]] = defaultdict(list)
    for record in records:
        groups[_question_of(record)].append(record)
    if question_id is not None and question_id not in groups:
        some = ", ".join(list(groups)[:3])
        raise ValueError(f"{path} has no record of question {question_id!r}; it has those of {some}, ...")
    chosen = records[:limit] if question_id is None else groups[question_id]
    kind = type(records[0]).__name__ if records else ""
    console.print(Text(f"{path}: {len(records)} {kind} records of {len(groups)} questions", "bold"))
    for name, group in groupby(chosen, _question_of):
        rows = list(group)
        console.print(Rule(Text(name, "bold"), align="left"))
        console.print(*_blocks(rows, decode) if kind in ("Question", "Trace") else [_table(rows)], sep="\n")
    if len(chosen) < len(records):
        console.print(Text(f"{len(chosen)} shown; --limit N or --question ID shows others.", "dim"))


def read_any(path: Path) -> list[Any]:
    """The records of a Parquet or JSONL file, or of a stage's folder: data.parquet and the parts not merged yet.

    Raises:
        ValueError: if there is nothing there, or it is not ours.
    """
    if path.is_dir():
        files = sorted(path.glob("data.parquet")) + sorted(path.glob("part-*.parquet"))
        if not files:
            inside = sorted({str(file.parent.relative_to(path)) for file in path.rglob("*.parquet")})
            advice = (
                f"its folders with records are {', '.join(inside)}" if inside else "give a stage's folder or a file"
            )
            raise ValueError(f"{path} holds no data.parquet and no part-*.parquet; {advice}.")
        records = {identity(record): record for file in files for record in _read_file(file)}
        return [records[key] for key in sorted(records)]
    if not path.exists():
        raise ValueError(f"No file or folder {path}; give a file of records, a stage's folder or a question file.")
    found = _read_file(path)
    return found if found and isinstance(found[0], Question) else sorted(found, key=identity)


def _read_file(file: Path) -> list[Any]:
    if file.suffix == ".jsonl":
        return list(read_questions(file))
    try:
        columns = pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} is neither a Parquet file nor a .jsonl file of questions: {error}") from error
    for record_type in RECORD_TYPES:
        if columns == [item.name for item in fields(record_type)]:
            return list(read_records(file, record_type))
    if {"id", "question", "answer"} <= set(columns):
        return list(read_questions(file))
    raise ValueError(
        f"{file} has columns {columns}, which are those of no record; give a file of questions, traces, answers, "
        "scores, weights or bounds."
    )


def _table(records: Sequence[Any]) -> Table:
    names = [item.name for item in fields(records[0]) if item.name not in _NOT_IN_TABLES]
    table = Table(box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name.replace("_", "\n"), overflow="fold")  # names as narrow as their values
    for record in records:
        table.add_row(*(Text(_cell(getattr(record, name), None).strip()) for name in names))
    return table


def _blocks(records: Iterable[Any], decode: Decoder | None) -> list[Text]:
    found = []
    for record in records:
        for item in fields(record):
            value = _cell(getattr(record, item.name), decode).rstrip("\n")
            found.append(Text.assemble((f"{item.name}:", "cyan"), "\n" if "\n" in value else " ", value))
        found.append(Text())
    return found


def _cell(value: Any, decode: Decoder | None) -> str:
    """One value: log-probs as their sum and number, ids as text or as number and ends, the rest as it is."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    if not isinstance(value, np.ndarray):
        return str(value)
    if value.dtype == np.float32:
        return f"Σ {value.sum():.3f} of {len(value)}"
    if decode is not None:
        return decode(value)
    ends = " ".join(map(str, value)) if len(value) <= _MOST_IDS else f"{' '.join(map(str, value[:4]))} … {value[-1]}"
    return f"{len(value)} ids: {ends}"


def _question_of(record: Any) -> str:
    return record.id if isinstance(record, Question) else str(record.question_id)
