"""`megavar show`: pretty-prints records from a file or a stage's folder.

The record type is inferred from the columns. Questions and traces have long texts and are printed as blocks with all
fields; in a trace that was scored the answer's first appearance is marked, and its leakage printed. Other records are
printed as one table per question, without ids of the question, answer tokens, seeds and places of the answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megavar.data.decode import Decoder, open_decoder
from megavar.data.questions import read_questions
from megavar.joins import Key
from megavar.record_files import RecordFile, rows
from megavar.records import Answer, Bound, Question, Score, TokenIds, Trace, Weight, identity_columns

RECORD_TYPES: tuple[type[Any], ...] = (Trace, Answer, Score, Weight, Bound)
_MAX_IDS = 8
_NOT_IN_TABLES = ("question_id", "round", "answer_ids", "seed", "answer_start", "answer_stop", "leakage_posterior")


def show(path: Path, limit: int, question_id: str | None, model: Path | None, console: Console) -> None:
    """Print the first `limit` records of a file or a stage's folder.

    Args:
        question_id: print all records of this question instead.
        model: Hugging Face folder whose tokenizer decodes token ids; None prints their number and the first and last.

    Raises:
        ValueError: if the path contains no records, or none of that question.
    """
    if limit < 0:
        raise ValueError(f"--limit {limit} is negative; give the number of records to print.")
    decode = open_decoder(model) if model else None
    source = _open(path)
    question_ids = dict.fromkeys(key[0] for key in source.identities)
    if question_id is not None and question_id not in question_ids:
        examples = ", ".join(list(question_ids)[:3])
        raise ValueError(f"{path} has no record of question {question_id!r}; it has records of {examples}, ...")
    keys = [key for key in source.identities if question_id in (None, key[0])]
    chosen = source.read(keys if question_id is not None else keys[:limit])
    score_of = _scores(path, chosen) if source.kind == "Trace" else {}
    num_records, kind = len(source.identities), source.kind
    console.print(Text(f"{path}: {num_records} {kind} records of {len(question_ids)} questions", "bold"))
    for name, group in groupby(chosen, _question_of):
        rows = list(group)
        console.print(Rule(Text(name, "bold"), align="left"))
        console.print(*_blocks(rows, decode, score_of) if kind in ("Question", "Trace") else [_table(rows)], sep="\n")
    if len(chosen) < num_records:
        console.print(Text(f"{len(chosen)} shown; --limit N or --question ID shows others.", "dim"))


@dataclass(frozen=True)
class _Source:
    """Records of one type; only those that are asked for are read whole."""

    kind: str
    identities: Sequence[tuple[Any, ...]]
    """Question id first, of each record in order."""
    read: Callable[[Sequence[tuple[Any, ...]]], list[Any]]
    """The records with these identities, in their order."""


def _open(path: Path) -> _Source:
    """The records of a Parquet or JSONL file, or of a stage's folder: data.parquet and unmerged part files.

    Raises:
        ValueError: if the path does not exist or contains no records of a known type.
    """
    if path.is_dir():
        files = sorted(path.glob("data.parquet")) + sorted(path.glob("part-*.parquet"))
        if not files:
            subfolders = sorted({str(file.parent.relative_to(path)) for file in path.rglob("*.parquet")})
            advice = (
                f"its folders with records are {', '.join(subfolders)}"
                if subfolders
                else "give a stage's folder or a file"
            )
            raise ValueError(f"{path} contains neither data.parquet nor part-*.parquet; {advice}.")
        return _of_records(files)
    if not path.exists():
        raise ValueError(f"No file or folder {path}; give a file of records, a stage's folder or a question file.")
    if path.suffix == ".jsonl" or _record_type(path) is Question:
        question_of = {(question.id,): question for question in read_questions(path)}
        return _Source("Question", list(question_of), lambda keys: [question_of[key] for key in keys])
    return _of_records([path])


def _of_records(files: Sequence[Path]) -> _Source:
    """Of files of one record type, the last of which counts where several have a record."""
    record_type = _record_type(files[0])
    names = identity_columns(record_type)
    found = {
        key
        for file in files
        for table in RecordFile(file, record_type, names).tables()
        for key in _identities(table, names)
    }

    def read(keys: Sequence[tuple[Any, ...]]) -> list[Any]:
        question_ids = pa.array(sorted({key[0] for key in keys}), pa.string())
        record_of: dict[tuple[Any, ...], Any] = {}
        for file in files:
            for table in RecordFile(file, record_type).tables():
                some = table.filter(pc.is_in(table["question_id"], question_ids))
                record_of.update(zip(_identities(some, names), rows(some, record_type, file), strict=True))
        return [record_of[key] for key in keys]

    return _Source(record_type.__name__, sorted(found), read)


def _identities(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _record_type(file: Path) -> type[Any]:
    try:
        columns = pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} is neither a Parquet file nor a .jsonl file of questions: {error}") from error
    for record_type in RECORD_TYPES:
        added = [item.name for item in fields(record_type) if item.default is None]  # by a later version
        if columns == [item.name for item in fields(record_type) if item.name in columns or item.name not in added]:
            return record_type
    if {"id", "question", "answer"} <= set(columns):
        return Question
    raise ValueError(
        f"{file} has columns {columns}, which match no record type; give a file of questions, traces, answers, scores, "
        "weights or bounds."
    )


def _table(records: Sequence[Any]) -> Table:
    names = [item.name for item in fields(records[0]) if item.name not in _NOT_IN_TABLES]
    table = Table(box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name.replace("_", "\n"), overflow="fold")  # header no wider than the values
    for record in records:
        table.add_row(*(Text(_cell(getattr(record, name), None).strip()) for name in names))
    return table


def _scores(path: Path, traces: Sequence[Trace]) -> dict[Key, Score]:
    """The scores of these traces that say where they first give the answer, if the round of their file has scores."""
    folder = path if path.is_dir() else path.parent
    file = folder.parent / "scores" / "data.parquet"
    if folder.name != "traces" or not file.is_file():
        return {}
    wanted = {(trace.question_id, trace.trace_index) for trace in traces}
    columns = [item.name for item in fields(Score) if not item.name.startswith("logp")]
    found: dict[Key, Score] = {}
    for score in RecordFile(file, Score, columns).rows():
        key = (score.question_id, score.trace_index)
        if key in wanted and score.leakage is not None:
            found[key] = score
    return found


def _blocks(records: Iterable[Any], decode: Decoder | None, score_of: Mapping[Key, Score]) -> list[Text]:
    blocks = []
    for record in records:
        score = score_of.get((record.question_id, record.trace_index)) if isinstance(record, Trace) else None
        for item in fields(record):
            value = _cell(getattr(record, item.name), decode).rstrip("\n")
            shown = Text(value)
            if item.name == "trace_ids" and score is not None:
                if decode is not None:
                    shown = _marked(record.trace_ids, score, decode)
                place = f"tokens {score.answer_start}:{score.answer_stop} of {len(record.trace_ids)}"
                nats = f"{score.leakage:.4f} nats (sampler: {score.leakage_posterior:.4f})"
                blocks.append(Text.assemble(("leakage:", "cyan"), f" {nats}, {place}"))
            blocks.append(Text.assemble((f"{item.name}:", "cyan"), "\n" if "\n" in value else " ", shown))
        blocks.append(Text())
    return blocks


def _marked(trace_ids: TokenIds, score: Score, decode: Decoder) -> Text:
    """The trace's text with ⟦ ⟧ around the tokens that say the answer."""
    text = decode(trace_ids)
    # Without what stands for half of a character.
    before, until = (decode(trace_ids[:end]).rstrip("\ufffd") for end in (score.answer_start, score.answer_stop))
    return Text.assemble(before, (f"⟦{until[len(before) :]}⟧", "reverse"), text[len(until) :].rstrip("\n"))


def _cell(value: Any, decode: Decoder | None) -> str:
    """Format a value: log-probs as sum and count; ids decoded, or as count with the first and last; others by str."""
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
    ends = " ".join(map(str, value)) if len(value) <= _MAX_IDS else f"{' '.join(map(str, value[:4]))} … {value[-1]}"
    return f"{len(value)} ids: {ends}"


def _question_of(record: Any) -> str:
    return record.id if isinstance(record, Question) else str(record.question_id)
