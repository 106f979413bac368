"""The records that pass between the stages, and their one file format.

Each record is a frozen dataclass; a file is Parquet (zstd) with one column a field, written under a
temporary name and renamed when complete. Field names are the interface: users read these files.
A stage that produces records for hours appends them through `RecordWriter`, which puts finished ones on
disk every few seconds as numbered parts and merges the parts when the stage is done.
"""

import glob
import os
import time
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TokenIds = np.ndarray[Any, np.dtype[np.int32]]
LogProbs = np.ndarray[Any, np.dtype[np.float32]]
Int32 = Annotated[int, pa.int32()]
Float64 = Annotated[float, pa.float64()]


class Sampler(StrEnum):
    """The model that a trace was sampled from (its proposal distribution)."""

    POLICY = "policy"
    POSTERIOR = "posterior"
    GOLD = "gold"


class TraceFinish(StrEnum):
    """Why a trace ended."""

    CLOSED = "closed"
    """With its close marker: usable."""
    LENGTH = "length"
    """Truncated at `sample.max_trace_tokens`."""
    ABORTED = "aborted"
    """Without a close marker, or aborted by the server."""


class AnswerFinish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """With the end of sequence."""
    LENGTH = "length"
    """Truncated at `sample.max_answer_tokens`."""
    ABORTED = "aborted"


class Verdict(StrEnum):
    """A verifier's judgement of one answer; a verifier that raises gives the text `error: ...` instead."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """The response holds nothing that could be an answer."""
    TIMEOUT = "timeout"


class WeightStatus(StrEnum):
    """What a trace's weight stands for."""

    OK = "ok"
    TRUNCATED = "truncated"
    """Not closed, so excluded: weight 0."""
    UNUSED = "unused"
    """Beyond `objective.num_traces`: weight 0."""
    GOLD = "gold"
    """The question's gold trace, with trace index -1."""
    NO_CORRECT_TRACE = "no_correct_trace"
    """No trace of the question has a correct answer; a weight above 0 then comes from the reference answer."""


@dataclass(frozen=True)
class Question:
    """Input: one question x with its known correct answer y'."""

    id: str
    question: str
    answer: str
    solution: str | None = None
    trace: str | None = None
    verifier: str = "math"
    source: str | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """One sampled (or gold) thinking trace z; `trace_ids` includes its close marker."""

    question_id: str
    trace_index: Int32
    round: Int32
    sampler: Sampler
    prompt_ids: TokenIds
    trace_ids: TokenIds
    logp_engine: LogProbs | None
    finish: TraceFinish
    seed: int


@dataclass(frozen=True, eq=False)
class Answer:
    """One sampled answer y after trace z; `correct` and `verdict` are null until verified."""

    question_id: str
    trace_index: Int32
    answer_index: Int32
    round: Int32
    answer_ids: TokenIds
    text: str
    finish: AnswerFinish
    seed: int
    correct: bool | None = None
    verdict: str | None = None
    """A `Verdict`, or `error: ...`."""


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probs of one trace under policy and posterior, by the training engine's forward."""

    question_id: str
    trace_index: Int32
    round: Int32
    logp_policy: LogProbs
    logp_posterior: LogProbs | None
    logp_answer: LogProbs | None
    num_answers: Int32 | None
    num_correct: Int32 | None


@dataclass(frozen=True)
class Weight:
    """The weight of one trace among the traces of its question (equation 8)."""

    question_id: str
    trace_index: Int32
    round: Int32
    log_ratio: Float64
    log_answer: Float64
    log_weight: Float64
    weight: Float64
    status: WeightStatus


@dataclass(frozen=True, eq=False)
class Bound:
    """What a question's traces say of the bounds on log pi(y' | x) (equation 5); natural log."""

    question_id: str
    round: Int32
    num_traces: int
    bounds: LogProbs
    """Estimates of L_1 to L_K, K = num_traces."""
    bounds_geometric_mean: LogProbs
    """The same with means instead of sums over tokens: no bounds, but what `ratio=geometric_mean` works with."""
    kl_posterior_policy: Float64
    """Estimate of KL(q || pi) of the trace, nats."""
    ess: Float64
    weight_entropy: Float64
    """Of the normalised weights, nats."""


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """What the trainer sees: a prompt without loss, a target (trace and answer) with one weight."""

    prompt_ids: TokenIds
    target_ids: TokenIds
    weight: float

    @property
    def num_tokens(self) -> int:
        """Tokens the model runs over."""
        return len(self.prompt_ids) + len(self.target_ids)


Record = TypeVar("Record", Question, Trace, Answer, Score, Weight, Bound)

_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    bool: pa.bool_(),
    TokenIds: pa.list_(pa.int32()),
    LogProbs: pa.list_(pa.float32()),
}


def _column_type(kind: Any) -> Any:
    """A field's type without `| None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def schema_of(record_type: type[Record]) -> pa.Schema:
    """The Parquet schema of a record type, column for field; an enum is a string column."""
    columns = []
    for item in fields(record_type):
        kind = _column_type(item.type)
        if typing.get_origin(kind) is Annotated:
            arrow = kind.__metadata__[0]
        else:
            arrow = _ARROW_TYPES[str if _is_enum(kind) else kind]
        columns.append(pa.field(item.name, arrow, kind is not item.type))
    return pa.schema(columns)


def write_records(file: Path, records: Iterable[Record], record_type: type[Record]) -> None:
    """Write all records to `file` atomically; an existing file is replaced."""
    schema = schema_of(record_type)
    rows = list(records)
    table = pa.table(
        {name: pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in schema.names},
        schema=schema,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(file) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file of anybody's, as plain Python values.

    Raises:
        ValueError: if the file is no Parquet file.
    """
    return list(_read_table(file).to_pylist())


def _read_table(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} is not a readable Parquet file: {error}") from error


def read_records(file: Path, record_type: type[Record]) -> list[Record]:
    """Read a file of records; id and log-prob columns come back as numpy arrays.

    Raises:
        ValueError: if the file is no Parquet file, its columns are not those of `record_type`, or a value of an enum
            column is unknown.
    """
    table = _read_table(file)
    schema = schema_of(record_type)
    if table.schema.names != schema.names:
        raise ValueError(
            f"{file} has columns {table.schema.names}, expected those of {record_type.__name__}: {schema.names}."
        )
    columns = [_column_values(file, table[item.name], item.type) for item in fields(record_type)]
    return [record_type(*row) for row in zip(*columns, strict=True)]


def _column_values(file: Path, column: pa.ChunkedArray, kind: Any) -> list[Any]:
    if pa.types.is_list(column.type):
        return [value.values.to_numpy() if value.is_valid else None for value in column]
    values: list[Any] = column.to_pylist()
    if not _is_enum(kind):
        return values
    unknown = sorted(set(map(str, values)) - set(kind))
    if unknown:
        raise ValueError(
            f"{file} has the {kind.__name__} {unknown[0]!r}, expected one of {', '.join(kind)}; the file is damaged or "
            "of another version."
        )
    members = {str(member): member for member in kind}
    return [members[value] for value in values]


class write_aside:
    """Context manager: yields a temporary path beside `file`, synced and renamed to it on success.

    What a killed process left of the same file is removed; a living one's is not.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        for left in self.file.parent.glob(f".{glob.escape(self.file.name)}.*.tmp"):
            pid = left.name.split(".")[-2]
            if pid.isdecimal() and not _is_running(int(pid)):
                left.unlink(missing_ok=True)
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.aside.unlink(missing_ok=True)
            return
        with open(self.aside, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self.aside, self.file)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class RecordWriter:
    """Appends records to numbered Parquet parts in `folder`; at most `flush_seconds` of work is unwritten.

    A killed writer loses only what was not flushed: the next one reads back what is there with `existing` and
    goes on. `finish` merges all into `folder`/data.parquet and removes the parts; it may itself be killed and
    repeated.
    """

    def __init__(self, folder: Path, record_type: type[Any], flush_seconds: float) -> None:
        self.folder, self.record_type, self.flush_seconds = folder, record_type, flush_seconds
        self.file = folder / "data.parquet"
        self._pending: list[Any] = []
        self._flushed_at = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._next_part = 1 + max((int(part.stem.split("-")[1]) for part in self._parts()), default=-1)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def existing(self) -> list[Any]:
        """The records on disk, each identity once, in the order of their identities."""
        files = [self.file] if self.file.exists() else []
        records = {identity(row): row for file in files + self._parts() for row in read_records(file, self.record_type)}
        return [records[key] for key in sorted(records)]

    def append(self, *records: Any) -> None:
        """Take records, which stay together; written now if the last write is `flush_seconds` ago."""
        self._pending += records
        if time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as the next part."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        write_records(self.folder / f"part-{self._next_part:06d}.parquet", self._pending, self.record_type)
        self._next_part += 1
        self._pending = []

    def finish(self) -> Path:
        """Merge all parts, ordered by identity, into data.parquet."""
        self.flush()
        write_records(self.file, self.existing(), self.record_type)
        for part in self._parts():
            part.unlink()
        return self.file


def identity(record: Any) -> tuple[str, int, int]:
    """(question_id, trace_index, answer_index) of a record; -1 where it has none."""
    return record.question_id, getattr(record, "trace_index", -1), getattr(record, "answer_index", -1)
