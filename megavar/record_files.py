"""Files of records: Parquet (compressed, checksums), one column a field, sorted by the columns that identify a row.

What a file holds is read in tables of bounded size, of the columns that are asked for, so memory does not grow with a
run; `rows` makes records of a table. Stages that produce records for hours use `RecordWriter`, which flushes them every
few seconds to numbered part files and merges these at the end.
"""

import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megavar.disk import atomic_write, make_folder
from megavar.records import Record, Score, Scored, Trace, column_type, identity_columns, is_enum, schema_of

logger = logging.getLogger(__name__)
# The default one gives pages back at once, and the kernel clears them again for the next table.
pa.set_memory_pool(pa.system_memory_pool())

LONG_ROWS, SHORT_ROWS = 256, 8192
"""Rows of a row group, and of a table that is read: of records that hold a trace's tokens, and of others."""
MERGED_AT_ONCE, MOST_HELD = 2**24, 16
"""Bytes of the rows that a merge sorts at a time, and how many times as many it may hold in memory."""


class DamagedFile(ValueError):
    """A file's bytes are not what was written."""


class RecordFile(Generic[Record]):
    """A file of records on disk.

    Args:
        columns: that are read, in the order of the record's fields; None: all. One that has a default, and that an
            older version did not write, is read as nulls.

    Raises:
        DamagedFile: if the file is not a readable Parquet file, its columns are not the fields of `record_type`, or a
            value is missing; while reading too.
        ValueError: if the file system cannot read it.
    """

    def __init__(self, file: Path, record_type: type[Record], columns: Sequence[str] | None = None) -> None:
        self.file: Path = file
        self.record_type: type[Record] = record_type
        self._schema = schema_of(record_type)
        self.columns: list[str] = self._schema.names if columns is None else list(columns)
        with _reading(file):
            found = pq.read_schema(file)
        added = [item.name for item in fields(record_type) if item.default is None]
        self.absent: list[str] = [name for name in added if name not in found.names]
        if found.names != [name for name in self._schema.names if name not in self.absent]:
            raise DamagedFile(
                f"{file} has columns {found.names}, expected those of {record_type.__name__}: {self._schema.names}; "
                "rerun the stage that writes it."
            )

    @property
    def schema(self) -> pa.Schema:
        """Of the tables."""
        return pa.schema([self._schema.field(name) for name in self.columns])

    def __len__(self) -> int:
        with _reading(self.file):
            return int(pq.read_metadata(self.file).num_rows)

    def tables(self) -> Iterator[pa.Table]:
        """The rows, in tables of bounded size."""
        with (
            _reading(self.file),
            pq.ParquetFile(
                self.file,
                page_checksum_verification=True,
                pre_buffer=False,  # which would keep what was read
            ) as source,
        ):
            num_missing = source.metadata.num_rows
            written = [name for name in self.columns if name not in self.absent]
            for batch in source.iter_batches(group_rows(self.record_type), columns=written):
                table = pa.Table.from_batches([batch])
                self._check(table)
                if len(written) < len(self.columns):
                    table = pa.concat_tables([self.schema.empty_table(), table], promote_options="default")
                num_missing -= len(table)
                yield table
            if num_missing:
                raise DamagedFile(f"{self.file}: its footer and its pages have different numbers of rows.")

    def rows(self) -> Iterator[Record]:
        """The rows as records; a field that is not read is empty."""
        for table in self.tables():
            yield from rows(table, self.record_type, self.file)

    def table(self) -> pa.Table:
        """All rows; for columns of a few bytes a row."""
        return pa.concat_tables([self.schema.empty_table(), *self.tables()]).combine_chunks()

    def _check(self, table: pa.Table) -> None:
        for name, column in zip(table.schema.names, table.columns, strict=True):
            field = self._schema.field(name)
            if column.type != field.type or (column.null_count and not field.nullable):
                raise DamagedFile(
                    f"{self.file}: column {name} has type {column.type} and {column.null_count} nulls, expected "
                    f"{field.type}{'' if field.nullable else ' and none'}; rerun the stage that writes it."
                )


def group_rows(record_type: type[Any]) -> int:
    """Rows of a row group: a table of that many fits into memory, however long they are."""
    return LONG_ROWS if record_type in (Trace, Score, Scored) else SHORT_ROWS


def rows(table: pa.Table, record_type: type[Record], file: Path | str = "a table") -> list[Record]:
    """Records of a table's rows; list columns become numpy arrays that share its memory, missing columns are empty.

    Args:
        file: that messages name.

    Raises:
        DamagedFile: if an enum column contains an unknown value.
    """
    columns = [
        _values(table[item.name], item.type, file) if item.name in table.schema.names else _empty(item.type, len(table))
        for item in fields(record_type)
    ]
    return [record_type(*row) for row in zip(*columns, strict=True)]


def lists(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """[values] of all rows of a list column, and [rows + 1] where each row begins; a null is an empty list."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if len(parts) != 1:
        parts = [np.concatenate([*parts, np.zeros(0, column.type.value_type.to_pandas_dtype())])]
    return parts[0], np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The list column of the float32 numbers whose bytes a column without nulls has; shares its memory."""
    found = []
    for chunk in column.chunks:
        _, starts, values = chunk.buffers()
        offsets = np.frombuffer(starts, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1] // 4
        numbers = pa.Array.from_buffers(pa.float32(), int(offsets[-1]), [None, values])
        found.append(pa.ListArray.from_arrays(pa.array(offsets), numbers))
    return pa.chunked_array(found, _FLOATS)


def list_column(values: NDArray[Any], starts: NDArray[np.int64]) -> pa.Array:
    """The list column of `lists`, without nulls."""
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))


def _values(column: pa.ChunkedArray, kind: Any, file: Path | str) -> list[Any]:
    if pa.types.is_list(column.type):
        values, starts = lists(column)
        pairs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        found: list[Any] = [values[start:stop] for start, stop in pairs]
        if column.null_count:
            found = [
                value if valid else None for value, valid in zip(found, column.is_valid().to_pylist(), strict=True)
            ]
        return found
    if not is_enum(kind):
        plain: list[Any] = column.to_pylist()
        return plain
    encoded = column.combine_chunks().dictionary_encode()
    names = [str(name) for name in encoded.dictionary.to_pylist()]
    unknown = sorted(set(names) - set(kind))
    if unknown:
        raise DamagedFile(
            f"{file} contains the {kind.__name__} {unknown[0]!r}, expected one of {', '.join(kind)}; the file is "
            "damaged or from another version; rerun the stage that writes it."
        )
    members = [kind(name) for name in names]
    return [members[index] for index in encoded.indices.to_pylist()]


def _empty(kind: Any, count: int) -> list[Any]:
    """Values of a column that is not read."""
    if column_type(kind) is not kind:  # may be None
        return [None] * count
    if is_enum(kind) or kind is str:
        return [""] * count
    return [0 if kind is int else np.zeros(0, np.int32)] * count


def write_records(file: Path, records: Iterable[Record], record_type: type[Record]) -> None:
    """Write records to `file` atomically, replacing an existing file, sorted; questions keep their order."""
    with RecordFileWriter(file, record_type) as writer:
        writer.write(sorted_table(table_of(list(records), record_type), record_type))


class RecordFileWriter:
    """Writes sorted rows to a file, atomically, table by table; use it with `with`.

    Row groups depend on the rows alone, not on the tables that they come in: equal rows make equal files.
    """

    def __init__(self, file: Path, record_type: type[Any]) -> None:
        self._file, self._type = file, record_type
        self._pending: list[pa.Table] = []
        self._opened = ExitStack()

    def __enter__(self) -> "RecordFileWriter":
        make_folder(self._file.parent)
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(self._file))
            self._writer = stack.enter_context(
                pq.ParquetWriter(temporary, schema_of(self._type), **_encoding(self._type))
            )
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            try:
                self._write_groups(at_least=1)
            except BaseException as failure:
                if not self._opened.__exit__(type(failure), failure, failure.__traceback__):
                    raise
                return
        self._opened.__exit__(*error)

    def write(self, table: pa.Table) -> None:
        """Append rows, which follow the ones before in the order of the file."""
        self._pending.append(table)
        self._write_groups(at_least=group_rows(self._type))

    def _write_groups(self, at_least: int) -> None:
        if sum(map(len, self._pending)) < at_least:
            return
        table, size = pa.concat_tables(self._pending), group_rows(self._type)
        whole = len(table) if at_least == 1 else len(table) - len(table) % size
        if whole:
            self._writer.write_table(table.slice(0, whole), row_group_size=size)
        self._pending = [table.slice(whole)] if whole < len(table) else []


def _encoding(record_type: type[Any]) -> dict[str, Any]:
    """Tokens and log-probs hardly repeat: looking for repetitions or extremes costs time and gains nothing.

    Of log-probs only the bytes of the exponents do, for which LZ4 is as good as zstd, at half its time. Rows that are
    kept for a merge only are not compressed.
    """
    schema = schema_of(record_type)
    element = {field.name: f"{field.name}.list.element" for field in schema if pa.types.is_list(field.type)}
    logps = {name for name in element if schema.field(name).type == _FLOATS}
    codec = {element.get(name, name): "lz4" if name in logps else "zstd" for name in schema.names}
    short = [field.name for field in schema if field.name not in element and field.type != pa.binary()]
    return {
        "compression": "none" if record_type is Scored else codec,
        "write_page_checksum": True,
        "use_dictionary": short,
        "write_statistics": short,
        "use_byte_stream_split": [element[name] for name in logps],
    }


def table_of(records: Sequence[Any], record_type: type[Any]) -> pa.Table:
    """A table of records, in their order."""
    schema = schema_of(record_type)
    return pa.table(
        {name: pa.array([getattr(row, name) for row in records], schema.field(name).type) for name in schema.names},
        schema=schema,
    )


def sorted_table(table: pa.Table, record_type: type[Any]) -> pa.Table:
    """The rows in the order of a file; as they are, of a record type that has none."""
    names = identity_columns(record_type)
    if not names:
        return table
    order = pc.sort_indices(table, [(name, "ascending") for name in names])
    return table if np.array_equal(order, np.arange(len(table))) else table.take(order)


def read_records(file: Path, record_type: type[Record]) -> list[Record]:
    """All records of a file.

    Raises:
        DamagedFile: see `RecordFile`, or if an enum column contains an unknown value.
        ValueError: if the file system cannot read it.
    """
    return list(RecordFile(file, record_type).rows())


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


class RecordWriter(Generic[Record]):
    """Appends records to a folder in numbered Parquet part files, so that a stage can resume after a kill.

    A killed process loses the unflushed records only; the next writer finds the others. `finish` merges the parts into
    `folder`/data.parquet and can itself be killed and repeated.

    Args:
        folder: created if missing.
        record_type: class of all records.
        flush_seconds: maximum time between the flushes of a steady stream of `append` calls.
        rank: of the process, where several write to the folder.
    """

    def __init__(self, folder: Path, record_type: type[Record], flush_seconds: float, rank: int = 0) -> None:
        self.folder, self.flush_seconds = folder, flush_seconds
        self.record_type: type[Record] = record_type
        self.file = folder / "data.parquet"
        self._rank = rank
        self._pending: list[Any] = []
        self._flushed_at = time.monotonic()
        make_folder(folder)
        self._next_part = 1 + max((int(part.stem.split("-")[1]) for part in parts(folder)), default=-1)

    def existing(self) -> Iterator[pa.Table]:
        """Tables of what is on disk, data.parquet before the parts; the last of rows with the same identity counts.

        A part that a crash of the machine has damaged is renamed, so that its records are made again.

        Raises:
            DamagedFile: if data.parquet is damaged.
        """
        if self.file.exists():
            try:
                yield from RecordFile(self.file, self.record_type).tables()
            except DamagedFile as error:
                raise DamagedFile(f"{error}; restore it, or remove it, and what it held is made again.") from error
        for part in parts(self.folder):
            try:
                read = list(RecordFile(part, self.record_type).tables())
            except DamagedFile as error:
                aside = part.with_name(part.name + ".damaged")
                os.replace(part, aside)
                logger.warning("%s; it is now %s, and what it held is made again.", error, aside.name)
                continue
            yield from read

    def set_aside_damaged(self) -> None:
        """Read all that is on disk; see `existing`."""
        for _ in self.existing():
            pass

    def existing_identities(self) -> set[tuple[Any, ...]]:
        """The columns that identify a row, of every row on disk, no part of which may be damaged."""
        names = identity_columns(self.record_type)
        found: set[tuple[Any, ...]] = set()
        for file in [*([self.file] if self.file.exists() else []), *parts(self.folder)]:
            for table in RecordFile(file, self.record_type, names).tables():
                found.update(zip(*(table[name].to_pylist() for name in names), strict=True))
        return found

    def append(self, *records: Record) -> None:
        """Add records, which will be in the same part; flushes if the last flush is `flush_seconds` ago."""
        self._pending += records
        if time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write pending records to the next part."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        name = f"part-{self._next_part:06d}{f'-{self._rank}' if self._rank else ''}.parquet"
        write_records(self.folder / name, self._pending, self.record_type)
        self._next_part += 1
        self._pending = []

    def finish(self) -> None:
        """Merge all parts into data.parquet."""
        self.flush()
        sources = [*([self.file] if self.file.exists() else []), *parts(self.folder)]
        with RecordFileWriter(self.file, self.record_type) as merged:
            for (table,) in merge([sources], self.record_type, self.folder):
                merged.write(table)
        for part in parts(self.folder):
            part.unlink()


def parts(folder: Path) -> list[Path]:
    """Part files of a folder, in order."""
    return sorted(folder.glob("part-*.parquet"))


def merge(groups: Sequence[Sequence[Path]], record_type: type[Any], folder: Path) -> Iterator[list[pa.Table]]:
    """The rows of several files, sorted and each once, in tables of bounded size.

    Args:
        groups: files whose rows belong side by side: of each group there should be one row for each identity. Within
            a group the last file counts.
        folder: gets a temporary subfolder if the rows do not fit into memory.

    Yields:
        One table a group, of the same length if each has all rows.
    """
    sources = [_Source(group, record_type) for group in groups]
    num_rows, size = max(source.num_rows for source in sources), group_rows(record_type)
    num_bytes = sum(sum(source.sizes) for source in sources)
    at_once = size * max(1, MERGED_AT_ONCE * num_rows // (size * max(num_bytes, 1)))
    spill = folder / ".merge"
    shutil.rmtree(spill, ignore_errors=True)
    try:
        num_tables = max(1, -(-num_rows // at_once))
        of_groups = [source.tables(at_once, num_tables, spill / str(n)) for n, source in enumerate(sources)]
        for tables in zip(*of_groups, strict=True):
            yield list(tables)
    finally:
        shutil.rmtree(spill, ignore_errors=True)


_FLOATS = pa.list_(pa.float32())
_RANK = "__rank"
Ranks = NDArray[np.int64]


class _Source:
    """Files whose rows are merged into one order."""

    def __init__(self, files: Sequence[Path], record_type: type[Any]) -> None:
        self._files, self._type = files, record_type
        self.sizes = [_uncompressed_bytes(file) for file in files]
        self.num_rows = 0
        self._ranks_of: list[Ranks] = []
        """Of each file's rows: the place in the merged order; -1 if a later row replaces it."""
        if files:
            names = identity_columns(record_type)
            tables = [RecordFile(file, record_type, names).table() for file in files]
            ranks = _ranks(pa.concat_tables(tables).combine_chunks(), names)
            self.num_rows = int(ranks.max(initial=-1)) + 1
            self._ranks_of = np.split(ranks, np.cumsum([len(table) for table in tables])[:-1])

    def tables(self, at_once: int, num_tables: int, spill: Path) -> Iterator[pa.Table]:
        """The rows in order, `at_once` in a table, until there are none left.

        Where a table's rows are in more files than fit into memory, they go through temporary files in `spill`.
        """
        spans = [(kept.min(), kept.max()) if len(kept := ranks[ranks >= 0]) else (0, -1) for ranks in self._ranks_of]
        held = np.zeros(num_tables + 1, np.int64)
        for (first, last), size in zip(spans, self.sizes, strict=True):
            if last >= 0:
                held[first // at_once] += size
                held[last // at_once + 1] -= size
        if held.cumsum().max() > MOST_HELD * MERGED_AT_ONCE:
            _distribute(self._ranked(range(len(self._files))), at_once, spill, self._type)
            for bucket in range(num_tables):
                yield _in_order(_spilled(spill / f"{bucket}.arrow"), self._type)
            return
        waiting = deque(sorted(range(len(spans)), key=lambda number: spans[number]))
        rows_held: list[pa.Table] = []
        for bucket in range(num_tables):
            end = (bucket + 1) * at_once
            while waiting and spans[waiting[0]][0] < end:
                rows_held += [_kept(table, ranks) for table, ranks in self._ranked([waiting.popleft()])]
            now, later = zip(*(_divided(table, end) for table in rows_held), strict=True) if rows_held else ((), ())
            rows_held = [table for table in later if len(table)]
            yield _in_order(now, self._type)

    def _ranked(self, numbers: Iterable[int]) -> Iterator[tuple[pa.Table, Ranks]]:
        """Tables of the files with these numbers, with the ranks of their rows."""
        for number in numbers:
            start = 0
            for table in RecordFile(self._files[number], self._type).tables():
                yield table, self._ranks_of[number][start : start + len(table)]
                start += len(table)


def _ranks(table: pa.Table, names: list[str]) -> Ranks:
    """[rows] the place of each row in the sorted whole, -1 if a later row has the same identity."""
    order = pc.sort_indices(table, [(name, "ascending") for name in names]).to_numpy().astype(np.int64)  # stable
    is_last = np.ones(len(order), bool)
    if len(order) > 1:
        ordered = table.take(pa.array(order))
        same = np.ones(len(order) - 1, bool)
        for name in names:
            column = ordered[name].combine_chunks()
            same &= pc.equal(column.slice(0, len(order) - 1), column.slice(1)).to_numpy(zero_copy_only=False)
        is_last[:-1] = ~same
    ranks = np.full(len(order), -1, np.int64)
    ranks[order[is_last]] = np.arange(is_last.sum())
    return ranks


def _kept(table: pa.Table, ranks: Ranks) -> pa.Table:
    """The table with the rank of each row as a column, without rows that were replaced."""
    ranked = table.append_column(_RANK, pa.array(ranks))
    return ranked if (ranks >= 0).all() else ranked.filter(pa.array(ranks >= 0))


def _divided(table: pa.Table, end: int) -> tuple[pa.Table, pa.Table]:
    """The rows with ranks below `end`, and the others; not copied where their ranks ascend, as a sorted part's do."""
    ranks = table[_RANK].to_numpy()
    if (ranks[:-1] <= ranks[1:]).all():
        first = int(np.searchsorted(ranks, end))
        return table.slice(0, first), table.slice(first)
    below = ranks < end
    return table.filter(pa.array(below)), table.filter(pa.array(~below))


def _in_order(tables: Sequence[pa.Table], record_type: type[Any]) -> pa.Table:
    if not tables:
        return schema_of(record_type).empty_table()
    table = pa.concat_tables(tables)
    ranks = table[_RANK].to_numpy()
    table = table.drop_columns([_RANK])
    if (ranks[:-1] <= ranks[1:]).all():
        return table
    return table.combine_chunks().take(pa.array(np.argsort(ranks, kind="stable")))


def _distribute(ranked: Iterable[tuple[pa.Table, Ranks]], at_once: int, folder: Path, record_type: type[Any]) -> None:
    """Write each row to the temporary file of its bucket, which holds `at_once` rows."""
    folder.mkdir(parents=True)
    schema = schema_of(record_type).append(pa.field(_RANK, pa.int64()))
    with ExitStack() as stack:
        open_buckets: dict[int, pa.RecordBatchFileWriter] = {}
        for table, ranks in ranked:
            kept = _kept(table, ranks)
            buckets = kept[_RANK].to_numpy() // at_once
            for bucket in np.unique(buckets).tolist():
                if bucket not in open_buckets:
                    file = folder / f"{bucket}.arrow"
                    open_buckets[bucket] = stack.enter_context(pa.ipc.new_file(str(file), schema))
                open_buckets[bucket].write_table(kept.filter(pa.array(buckets == bucket)).cast(schema))


def _spilled(file: Path) -> list[pa.Table]:
    if not file.exists():
        return []
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    file.unlink()
    return [table]


def _uncompressed_bytes(file: Path) -> int:
    with _reading(file):
        found = pq.read_metadata(file)
    return sum(found.row_group(index).total_byte_size for index in range(found.num_row_groups))
