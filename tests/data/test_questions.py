"""Bad question files are refused with file, line and field."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megavar.data.questions import read_questions
from megavar.record_files import write_records
from megavar.records import Question

GOOD = {"id": "a", "question": "1+1", "answer": "2"}


def write(folder, *rows):
    file = folder / "q.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_jsonl_and_parquet_give_the_same_questions(tmp_path):
    rows = [{**GOOD, "trace": "so 2", "source": "s"}, {**GOOD, "id": "b", "solution": None}]
    questions = read_questions(write(tmp_path, *rows, ""))
    assert questions[0] == Question("a", "1+1", "2", None, "so 2", "math", "s")
    write_records(tmp_path / "q.parquet", questions, Question)
    assert read_questions(tmp_path / "q.parquet") == questions


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{broken"], r"line 2: invalid JSON"),
        ([GOOD, GOOD], r"line 2: id 'a' was already on line 1"),
        ([{"question": "x", "answer": "1"}], r"line 1: field 'id' is missing"),
        ([{**GOOD, "answer": ""}], r"line 1: field 'answer' is empty"),
        ([{**GOOD, "id": "  "}], r"line 1: field 'id' is empty"),
        ([{**GOOD, "answer": 2}], r"line 1: field 'answer' must be a string, got 2"),
        ([{**GOOD, "hint": "x"}], r"line 1: unknown field 'hint'"),
        (["[1]"], r"line 1: expected a JSON object"),
        ([], r"contains no questions"),
    ],
)
def test_bad_files_are_refused_by_line_and_field(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path, *rows))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No question file"):
        read_questions(tmp_path / "none.jsonl")


def test_a_line_that_is_not_utf8_is_named_and_a_byte_order_mark_is_not_text(tmp_path):
    file, line = tmp_path / "q.jsonl", json.dumps(GOOD).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert read_questions(file) == [Question("a", "1+1", "2")]
    file.write_bytes(line + b"\n" + line.replace(b'"a"', b'"\xff"'))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: invalid JSON"):
        read_questions(file)


def test_parquet_rows_are_checked_like_lines(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"], "question": ["x", "y"], "answer": [1, 2]}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q\.parquet, line 1: field 'answer' must be a string, got 1"):
        read_questions(tmp_path / "q.parquet")
