"""Reads the rows of published files one by one: JSON lines, JSON arrays, CSV and Parquet.

Memory is that of a row, of a row group of Parquet, or of a mebibyte of a JSON array. A file that breaks off, or is no
text, is refused as a whole: it was not downloaded well.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROW_BYTES = 2**27
"""A longer row is refused: nothing that is published needs more."""
_CHUNK_CHARACTERS = 2**20
_PARQUET_ROWS = 256
_BETWEEN = re.compile(r"[\s,]*")
Row = dict[str, Any]


def read_file(file: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a `.parquet`, `.csv`, `.json` or `.jsonl` file, each with its number, from 1.

    Of JSON lines the number is that of the line. What is in a `.json` or `.jsonl` file is found by its first character:
    `[` begins an array.

    Raises:
        ValueError: naming file and row, if the file is missing, empty, damaged or of another kind, or a row is no
            object or larger than 128 MiB.
    """
    if not file.is_file():
        raise ValueError(f"No file {file}; give files as they were downloaded, not the folder they are in.")
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".json": _json_rows, ".jsonl": _json_rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file} is none of {', '.join(readers)}; unpack or convert it first.")
    number = 0
    try:
        for number, row in reader(file):
            if not isinstance(row, dict):
                raise ValueError(f"{file}, row {number}: expected an object with columns, got {row!r:.80}.")
            yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 after row {number} ({error.reason}); convert it, or download it again."
        ) from error
    if not number:
        raise ValueError(f"{file} has no rows.")


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as source:
        start = source.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _array_rows(file) if start.startswith(b"[") else _line_rows(file)


def _line_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise _too_large(file, number)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace():
                yield number, _loads(file, number, line)


def _loads(file: Path, number: int, line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass  # NaN and integers of more than 64 bits, which json accepts; or a mistake, which it describes better
    try:
        return json.loads(line.decode())
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken(file, number, error) from error


def _array_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of an array, which is read in chunks: an object is complete, or it cannot be parsed."""
    decoder, number, size = json.JSONDecoder(), 0, _CHUNK_CHARACTERS
    with file.open(encoding="utf-8-sig") as source:
        text = source.read(size)
        position = text.index("[") + 1
        while True:
            position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it matches any text
            if text.startswith("]", position):
                return
            if not text.startswith("{", position) and position < len(text):
                found = text[position : position + 40]
                raise ValueError(f"{file}, row {number + 1}: expected an object with columns, got {found!r}.")
            try:
                row, position = decoder.raw_decode(text, position)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(text) - position > MAX_ROW_BYTES:
                    raise _too_large(file, number + 1) from error
                if not (more := source.read(size)):
                    raise _broken(file, number + 1, error) from error
                text, position, size = text[position:] + more, 0, 2 * size
                continue
            number, size = number + 1, _CHUNK_CHARACTERS
            yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with file.open(encoding="utf-8-sig", newline="") as source:
        reader = csv.DictReader(source, strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, row {number} has another number of values than the header has columns; the file is "
                        "damaged, or not separated by commas."
                    )
                yield number, row
        except csv.Error as error:
            raise ValueError(f"{file}, after line {reader.line_num}: {error}; download it again.") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pa.ArrowException) as error:
        words = " ".join(str(error).split())
        raise ValueError(
            f"{file} is not a readable Parquet file after row {number}: {words}; download it again."
        ) from error


def _too_large(file: Path, number: int) -> ValueError:
    return ValueError(
        f"{file}, row {number} is larger than {MAX_ROW_BYTES >> 20} MiB, the limit of a row; take it out."
    )


def _broken(file: Path, number: int, error: Exception) -> ValueError:
    return ValueError(
        f"{file}, row {number}: invalid JSON ({error}); the file is damaged or breaks off, download it again."
    )
