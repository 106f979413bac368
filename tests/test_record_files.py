"""Files are sorted whatever order their rows came in, merged in bounded memory, and read side by side."""

import numpy as np
import pytest

from megavar import record_files
from megavar.joins import by_question, identities
from megavar.record_files import (
    RecordFile,
    RecordFileWriter,
    RecordWriter,
    merge,
    read_records,
    rows,
    table_of,
    write_records,
)
from megavar.records import Answer, Score, Scored, Trace, identity


def trace(question, index, tokens=3, seed=0):
    return Trace(
        question, index, 1, "policy", np.array([1], np.int32), np.arange(tokens, dtype=np.int32), None, "closed", seed
    )


def answer(question, index, number, text=""):
    return Answer(question, index, number, 1, np.array([number], np.int32), text, "stop", 0)


def parts_of(folder, order):
    writer = RecordWriter(folder, Trace, 1e9)
    for start in range(0, len(order), 7):
        writer.append(*(trace(f"q{number // 4}", number % 4, number % 50) for number in order[start : start + 7]))
        writer.flush()
    return writer


def test_a_merge_gives_the_same_bytes_in_any_order_and_through_temporary_files(tmp_path, monkeypatch):
    random, numbers = np.random.default_rng(0), np.arange(3000)
    files = []
    for name, at_once in (("memory", 2**30), ("spilled", 2**15), ("shuffled", 2**15)):
        monkeypatch.setattr(record_files, "MERGED_AT_ONCE", at_once)
        writer = parts_of(tmp_path / name, random.permutation(numbers) if name == "shuffled" else numbers)
        writer.finish()
        files.append(writer.file.read_bytes())
        assert [file.name for file in (tmp_path / name).iterdir()] == ["data.parquet"]
    assert files[0] == files[1] == files[2]
    found = read_records(tmp_path / "spilled" / "data.parquet", Trace)
    assert [identity(row)[:2] for row in found] == sorted((f"q{number // 4}", number % 4) for number in numbers)
    assert all(len(row.trace_ids) == (int(row.question_id[1:]) * 4 + row.trace_index) % 50 for row in found)


@pytest.mark.parametrize("at_once", [2**30, 1])
def test_of_rows_with_the_same_identity_the_last_counts(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(record_files, "MERGED_AT_ONCE", at_once)
    monkeypatch.setattr(record_files, "LONG_ROWS", 2)
    writer = RecordWriter(tmp_path, Trace, 1e9)
    for seed in (1, 2, 3):
        writer.append(trace("a", 0, seed=seed), trace("b", seed, seed=seed))
        writer.flush()
    writer.finish()
    found = read_records(writer.file, Trace)
    assert [(row.question_id, row.trace_index, row.seed) for row in found] == [
        ("a", 0, 3), ("b", 1, 1), ("b", 2, 2), ("b", 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("at_once", [2**30, 1])
def test_rows_of_several_writers_are_merged_side_by_side(tmp_path, monkeypatch, at_once):
    """As ranks write the scores of one trace under two models, in other orders and files."""
    monkeypatch.setattr(record_files, "MERGED_AT_ONCE", at_once)
    monkeypatch.setattr(record_files, "LONG_ROWS", 4)
    random = np.random.default_rng(0)
    for name in ("policy", "posterior"):
        writers = [RecordWriter(tmp_path / name, Scored, 0.0, rank) for rank in (0, 3)]
        for row in random.permutation(50).tolist():
            value = row if name == "policy" else -row
            writers[row % 2].append(Scored(row, np.array([value] * (row % 5), np.float32).tobytes(), b""))
    groups = [record_files.parts(tmp_path / name) for name in ("policy", "posterior")]
    assert len(groups[0]) == 50
    pairs = []
    for tables in merge(groups, Scored, tmp_path):
        pairs += zip(*(rows(table, Scored) for table in tables), strict=True)
    assert [(one.row, other.row) for one, other in pairs] == [(row, row) for row in range(50)]
    found = [[np.frombuffer(scored.logp_trace, np.float32).tolist() for scored in pair] for pair in pairs]
    assert found == [[[row] * (row % 5), [-row] * (row % 5)] for row in range(50)]


@pytest.mark.parametrize("most_held", [0, 10**9], ids=["spilled", "held"])
def test_parts_are_divided_where_tables_end_whether_they_are_sorted_or_not(tmp_path, monkeypatch, most_held):
    monkeypatch.setattr(record_files, "MERGED_AT_ONCE", 1)
    monkeypatch.setattr(record_files, "MOST_HELD", most_held)
    monkeypatch.setattr(record_files, "LONG_ROWS", 4)
    orders = {"sorted": np.arange(22), "other": np.random.default_rng(0).permutation(22)}
    groups = []
    for name, order in orders.items():
        groups.append([tmp_path / f"{name}-{part}.parquet" for part in range(2)])
        for part, file in enumerate(groups[-1]):
            scored = [Scored(row, bytes(row % 3), b"") for row in order.tolist() if row % 2 == part]
            with RecordFileWriter(file, Scored) as writer:
                writer.write(table_of(scored, Scored))
    found = [[table["row"].to_pylist() for table in tables] for tables in merge(groups, Scored, tmp_path)]
    assert found == [[list(range(start, min(start + 4, 22)))] * 2 for start in range(0, 22, 4)]


def test_files_are_read_side_by_side_in_whole_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "LONG_ROWS", 3)
    monkeypatch.setattr(record_files, "SHORT_ROWS", 5)
    counts = {f"q{number:03d}": number % 9 for number in range(60)}  # question -> traces; each trace has two answers
    traces = [trace(question, index) for question, count in counts.items() for index in range(count)]
    answers = [
        answer(row.question_id, row.trace_index, n) for row in traces if row.question_id != "q004" for n in range(2)
    ]
    answers.append(answer("q999", 0, 0))
    write_records(tmp_path / "t.parquet", traces, Trace)
    write_records(tmp_path / "a.parquet", answers, Answer)
    seen, found_traces, found_answers = set(), [], []
    traces_file = RecordFile(tmp_path / "t.parquet", Trace, ["question_id", "trace_index"])
    for some_traces, some_answers in by_question(traces_file, RecordFile(tmp_path / "a.parquet", Answer)):
        questions = {*some_traces["question_id"].to_pylist(), *some_answers["question_id"].to_pylist()}
        assert not questions & seen
        seen |= questions
        found_traces += rows(some_traces, Trace)
        found_answers += rows(some_answers, Answer)
    assert list(map(identity, found_traces)) == list(map(identity, traces))
    assert list(map(identity, found_answers)) == list(map(identity, answers))
    assert all(len(row.trace_ids) == 0 and row.logp_engine is None for row in found_traces)  # not asked for


def test_a_file_in_another_order_is_refused(tmp_path):
    with RecordFileWriter(tmp_path / "a.parquet", Answer) as writer:
        writer.write(table_of([answer("b", 0, 0), answer("b", 1, 0), answer("b", 0, 1)], Answer))
    with pytest.raises(ValueError, match=r"a\.parquet is not sorted by question_id, trace_index, answer_index"):
        list(by_question(RecordFile(tmp_path / "a.parquet", Answer)))


def test_row_groups_depend_on_the_rows_alone(tmp_path):
    table = table_of([answer("q", 0, number, "x" * (number % 7)) for number in range(20_000)], Answer)
    for name, size in (("one", 20_000), ("many", 777)):
        with RecordFileWriter(tmp_path / name, Answer) as writer:
            for start in range(0, len(table), size):
                writer.write(table.slice(start, size))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    *_, last = identities(RecordFile(tmp_path / "one", Answer, ["question_id", "trace_index", "answer_index"]))
    assert last == ("q", 0, 19_999)


def test_files_with_one_row_group_as_they_were_written_before_are_read(tmp_path):
    import pyarrow.parquet as pq

    given = [Score("q", index, 1, np.full(index, -1, np.float32), None, None, None, None) for index in range(1000)]
    pq.write_table(table_of(given, Score), tmp_path / "s.parquet", compression="zstd", write_page_checksum=True)
    found = read_records(tmp_path / "s.parquet", Score)
    assert [(row.trace_index, len(row.logp_policy)) for row in found] == [(index, index) for index in range(1000)]
