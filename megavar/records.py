"""The records that stages exchange, and their file format (docs/records.md).

Each record is a frozen dataclass. A file is Parquet (zstd) with one column per field, written to a temporary file and
renamed. Field names are a public interface: users read these files. Stages that produce records for hours use
`RecordWriter`, which flushes them every few seconds to numbered part files and merges these at the end.
Only rank 0 reads and writes records.
"""

import glob
import logging
import os
import shutil
import socket
import time
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megavar.ranks import ExplainedFailure, process_exists

logger = logging.getLogger(__name__)

_HOST = socket.gethostname()
TokenIds = np.ndarray[Any, np.dtype[np.int32]]
"""[tokens] int32."""
LogProbs = np.ndarray[Any, np.dtype[np.float32]]
"""[tokens] float32 natural-log probabilities."""
Int32 = Annotated[int, pa.int32()]
Float64 = Annotated[float, pa.float64()]


class Sampler(StrEnum):
    """The model that a trace was sampled from (its proposal distribution)."""

    POLICY = "policy"
    POSTERIOR = "posterior"
    GOLD = "gold"


class TraceFinish(StrEnum):
    """Finish reason of a trace."""

    CLOSED = "closed"
    """Generated the close marker; only these traces get weight."""
    LENGTH = "length"
    """Truncated at `sample.max_trace_tokens`."""
    ABORTED = "aborted"
    """Stopped without the close marker, or aborted by the server."""


class AnswerFinish(StrEnum):
    """Finish reason of an answer."""

    STOP = "stop"
    """Generated the end-of-sequence token."""
    LENGTH = "length"
    """Truncated at `sample.max_answer_tokens`."""
    ABORTED = "aborted"
    """Aborted by the server."""


class Verdict(StrEnum):
    """A verifier's result for one answer. If the verifier raises or crashes, the verdict is the text `error: ...`."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """No answer could be extracted from the response."""
    TIMEOUT = "timeout"
    """The verifier exceeded `verify.timeout_seconds`."""


class WeightStatus(StrEnum):
    """How a trace got its weight."""

    OK = "ok"
    """Computed by the objective; can be 0."""
    TRUNCATED = "truncated"
    """The trace is not closed: weight 0."""
    UNUSED = "unused"
    """Trace index at or above `objective.num_traces`: weight 0."""
    GOLD = "gold"
    """The question's gold trace (trace index -1), a fallback."""
    NO_CORRECT_TRACE = "no_correct_trace"
    """No trace of the question has weight by its sampled answers. If the weight is positive, it is computed from the
    reference answer."""
    UNVERIFIABLE = "unverifiable"
    """The question has no verifier: the weight is computed from the reference answer, or 0."""


@dataclass(frozen=True)
class Question:
    """Input: one question x with its ground-truth answer y'."""

    id: str
    """Unique in the file."""
    question: str
    answer: str
    """Short verifiable answer; also the posterior's hint."""
    solution: str | None = None
    """Reference answer text after the trace; None: rendered from `answer` by `templates.solution`."""
    trace: str | None = None
    """Gold trace, without markers."""
    verifier: str = "math"
    """Registry key, or `package.module:function`; `none`: its answers are not judged, and not sampled."""
    source: str | None = None
    """Origin of the question; informative only."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One sampled (or gold) thinking trace z."""

    question_id: str
    trace_index: Int32
    """0 to K - 1 within the question."""
    round: Int32
    """From 1."""
    sampler: Sampler
    prompt_ids: TokenIds
    """The sampler's prompt, as sent to the server."""
    trace_ids: TokenIds
    """As generated, close marker included; never decoded and re-encoded."""
    logp_engine: LogProbs | None
    """[trace tokens] by the serving engine, of logits / temperature, before top-p; None: not asked for
    (`sample.keep_logps`)."""
    finish: TraceFinish
    seed: int
    """Sampling seed of the request."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer y that the policy sampled after trace z."""

    question_id: str
    trace_index: Int32
    answer_index: Int32
    """0 to n - 1 within the trace."""
    round: Int32
    answer_ids: TokenIds
    """As generated, end-of-sequence token included."""
    text: str
    finish: AnswerFinish
    seed: int
    correct: bool | None = None
    """None until verified."""
    verdict: str | None = None
    """A `Verdict` or `error: ...`; None until verified."""


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probs of one trace under policy and posterior, by the training engine; empty for a truncated trace."""

    question_id: str
    trace_index: Int32
    round: Int32
    logp_policy: LogProbs
    """[trace tokens] log pi(z_t | x, z_<t)."""
    logp_posterior: LogProbs | None
    """[trace tokens] log q(z_t | x, y', z_<t); `logp_policy` if the policy sampled the trace. None: not scored."""
    logp_answer: LogProbs | None
    """[answer tokens] log pi(y'_t | x, z, y'_<t) of the reference answer. None: not scored."""
    num_answers: Int32 | None
    """Verified answers of the trace; None if it has none, 0 if the question has no verifier."""
    num_correct: Int32 | None


@dataclass(frozen=True)
class Weight:
    """Training weight of one trace (docs/method.md, equation 8)."""

    question_id: str
    trace_index: Int32
    """-1: the question's gold trace."""
    round: Int32
    log_ratio: Float64
    """d_k, nats."""
    log_answer: Float64
    """log a_k, nats."""
    log_weight: Float64
    """log rho_k = log_ratio + log_answer, unnormalised; -inf if truncated."""
    weight: Float64
    """Weight in the loss; iwae: rho_k / sum_j rho_j over the question's traces."""
    status: WeightStatus


@dataclass(frozen=True, eq=False)
class Bound:
    """Estimates of the bounds on log pi(y' | x) from a question's closed traces, nats (docs/method.md, equation 5)."""

    question_id: str
    round: Int32
    num_traces: int
    """Closed traces K."""
    bounds: LogProbs
    """[K] estimates of L_1 to L_K."""
    bounds_geometric_mean: LogProbs
    """[K] the same with means over tokens instead of sums: not bounds, but the quantities of `ratio=geometric_mean`."""
    kl_posterior_policy: Float64
    """Estimate of KL(q || pi) over traces, nats."""
    ess: Float64
    """Effective sample size of the weights, in traces."""
    weight_entropy: Float64
    """Entropy of the normalised weights, nats."""


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """Input of the trainer; in memory only."""

    prompt_ids: TokenIds
    """Context without loss."""
    target_ids: TokenIds
    """Trace and answer tokens, trained or scored."""
    weight: float
    """Of every target token in the loss."""

    @property
    def num_tokens(self) -> int:
        """Length of prompt and target together."""
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
    """Type of a field without `| None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def schema_of(record_type: type[Record]) -> pa.Schema:
    """Parquet schema of a record type: one column per field; enums are string columns."""
    columns = []
    for item in fields(record_type):
        kind = _column_type(item.type)
        if typing.get_origin(kind) is Annotated:
            arrow = kind.__metadata__[0]
        else:
            arrow = _ARROW_TYPES[str if _is_enum(kind) else kind]
        columns.append(pa.field(item.name, arrow, kind is not item.type))
    return pa.schema(columns)


class DamagedFile(ValueError):
    """A file's bytes are not what was written."""


def write_records(file: Path, records: Iterable[Record], record_type: type[Record]) -> None:
    """Write records to `file` atomically, replacing an existing file; pages carry checksums."""
    schema = schema_of(record_type)
    rows = list(records)
    table = pa.table(
        {name: pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in schema.names},
        schema=schema,
    )
    make_folder(file.parent)
    with atomic_write(file) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of any Parquet file as plain Python values.

    Raises:
        ValueError: if the file is not a readable Parquet file.
    """
    with _reading(file):
        return list(pq.read_table(file, page_checksum_verification=True).to_pylist())


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what Arrow makes of a damaged file into one line that names it."""
    try:
        yield
    except DamagedFile:
        raise
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of the content
            raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
        raise DamagedFile(f"{file} is not a readable Parquet file: {' '.join(str(error).split())}") from error


def read_records(file: Path, record_type: type[Record]) -> list[Record]:
    """Read a file of records; list columns become numpy arrays.

    Raises:
        DamagedFile: if the file is not a readable Parquet file, its columns are not the fields of `record_type`, a
            value is missing, or an enum column contains an unknown one.
        ValueError: if the file system cannot read it.
    """
    with _reading(file):
        table = pq.read_table(file, page_checksum_verification=True)
        _check_columns(file, table, schema_of(record_type), record_type.__name__)
        columns = [_column_values(file, table[item.name], item.type) for item in fields(record_type)]
        return [record_type(*row) for row in zip(*columns, strict=True)]


def _check_columns(file: Path, table: pa.Table, expected: pa.Schema, name: str) -> None:
    if table.schema.names != expected.names:
        raise DamagedFile(
            f"{file} has columns {table.schema.names}, expected those of {name}: {expected.names}; rerun the stage "
            "that writes it."
        )
    for field, column in zip(expected, table.columns, strict=True):
        if column.type != field.type or (column.null_count and not field.nullable):
            raise DamagedFile(
                f"{file}: column {field.name} has type {column.type} and {column.null_count} nulls, expected "
                f"{field.type}{'' if field.nullable else ' and none'}; rerun the stage that writes it."
            )


def _column_values(file: Path, column: pa.ChunkedArray, kind: Any) -> list[Any]:
    if pa.types.is_list(column.type):
        return [value.values.to_numpy() if value.is_valid else None for value in column]
    values: list[Any] = column.to_pylist()
    if not _is_enum(kind):
        return values
    unknown = sorted(set(map(str, values)) - set(kind))
    if unknown:
        raise DamagedFile(
            f"{file} contains the {kind.__name__} {unknown[0]!r}, expected one of {', '.join(kind)}; the file is "
            "damaged or from another version; rerun the stage that writes it."
        )
    members = {str(member): member for member in kind}
    return [members[value] for value in values]


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Context manager: yields a temporary path in the folder of `file`; on success it is synced and renamed to `file`.

    The folder is synced too: a power cut could undo the rename. Stale temporary files of dead processes of this machine
    are removed.

    Raises:
        ExplainedFailure: if the file cannot be written (a full disk, a quota); an old one is then as it was.
    """
    for existing in file.parent.glob(f".{glob.escape(file.name)}.{glob.escape(_HOST)}.*.tmp"):
        pid = existing.name.split(".")[-2]
        if pid.isdecimal() and not process_exists(int(pid)):
            existing.unlink(missing_ok=True)
    temporary = file.with_name(f".{file.name}.{_HOST}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        free_megabytes = shutil.disk_usage(file.parent).free / 1e6
        raise ExplainedFailure(
            f"{file} could not be written: {error.strerror or error} ({free_megabytes:,.0f} MB are free); what was "
            "written before is kept, and once that is mended the same command goes on."
        ) from error


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where they are missing, and sync the folders that they are created in."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


class RecordWriter:
    """Appends records to a folder in numbered Parquet part files, so that a stage can resume after a kill.

    A killed process loses the unflushed records only; the next writer gets the others from `existing`. `finish` merges
    the parts into `folder`/data.parquet and can itself be killed and repeated.

    Args:
        folder: created if missing.
        record_type: class of all records.
        flush_seconds: maximum time between the flushes of a steady stream of `append` calls.
    """

    def __init__(self, folder: Path, record_type: type[Any], flush_seconds: float) -> None:
        self.folder, self.record_type, self.flush_seconds = folder, record_type, flush_seconds
        self.file = folder / "data.parquet"
        self._pending: list[Any] = []
        self._flushed_at = time.monotonic()
        make_folder(folder)
        self._next_part = 1 + max((int(part.stem.split("-")[1]) for part in self._parts()), default=-1)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def existing(self) -> list[Any]:
        """Records on disk, without duplicates, sorted by `identity`.

        A part that a crash of the machine has damaged is renamed, so that its records are made again.

        Raises:
            DamagedFile: if data.parquet is damaged.
        """
        try:
            rows = read_records(self.file, self.record_type) if self.file.exists() else []
        except DamagedFile as error:
            raise DamagedFile(f"{error}; restore it, or remove it, and what it held is made again.") from error
        for part in self._parts():
            try:
                rows += read_records(part, self.record_type)
            except DamagedFile as error:
                aside = part.with_name(part.name + ".damaged")
                os.replace(part, aside)
                logger.warning("%s; it is now %s, and what it held is made again.", error, aside.name)
        records = {identity(row): row for row in rows}
        return [records[key] for key in sorted(records)]

    def append(self, *records: Any) -> None:
        """Add records, which will be in the same part; flushes if the last flush is `flush_seconds` ago."""
        self._pending += records
        if time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write pending records to the next part."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        write_records(self.folder / f"part-{self._next_part:06d}.parquet", self._pending, self.record_type)
        self._next_part += 1
        self._pending = []

    def finish(self) -> list[Any]:
        """Merge all parts into data.parquet, and return its records, sorted by `identity`."""
        self.flush()
        rows = self.existing()
        write_records(self.file, rows, self.record_type)
        for part in self._parts():
            part.unlink()
        return rows


def identity(record: Any) -> tuple[str, int, int]:
    """(question_id, trace_index, answer_index) of a record; -1 for a field that it does not have."""
    return record.question_id, getattr(record, "trace_index", -1), getattr(record, "answer_index", -1)
