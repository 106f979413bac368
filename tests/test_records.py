"""Records survive the disk, and a killed writer loses nothing that it flushed."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from megavar.disk import atomic_write
from megavar.ranks import ExplainedFailure
from megavar.record_files import DamagedFile, RecordWriter, read_records, write_records
from megavar.records import Answer, AnswerFinish, Score, Trace, Weight, schema_of


def answer(index: int, correct: bool | None = None) -> Answer:
    ids = np.arange(index, dtype=np.int32)
    return Answer("q", 0, index, 1, ids, f"text {index}", "stop", 2**62 + index, correct)


def indices(writer):
    writer.set_aside_damaged()
    return sorted(index for _, _, index in writer.existing_identities())


def test_ids_log_probs_nulls_and_seeds_come_back_exactly(tmp_path):
    logps = np.array([-0.1, -1e-30], np.float32)
    traces = [
        Trace("a", 0, 1, "policy", np.array([1, 2], np.int32), np.zeros(0, np.int32), None, "closed", 2**62 + 1),
        Trace("b", 3, 1, "gold", np.array([7], np.int32), np.array([8, 9], np.int32), logps, "length", 0),
    ]
    write_records(tmp_path / "t.parquet", traces, Trace)
    first, second = read_records(tmp_path / "t.parquet", Trace)
    assert first.logp_engine is None and first.trace_ids.tolist() == [] and first.seed == 2**62 + 1
    assert second.trace_ids.tolist() == [8, 9] and second.trace_ids.dtype == np.int32
    assert second.logp_engine.tobytes() == logps.tobytes()


def test_weights_keep_float64_and_minus_infinity(tmp_path):
    row = Weight("a", 0, 1, 0.1 + 1e-15, -np.inf, -np.inf, 1 / 3, "ok")
    write_records(tmp_path / "w.parquet", [row], Weight)
    assert read_records(tmp_path / "w.parquet", Weight) == [row]


def test_numpy_scalars_and_wider_ids_are_stored_as_the_documented_types(tmp_path):
    row = Answer(
        "a", np.int64(1), np.int32(2), 1, np.array([3], np.int64), "t", "stop", np.int64(2**62), np.bool_(True)
    )
    write_records(tmp_path / "a.parquet", [row], Answer)
    (found,) = read_records(tmp_path / "a.parquet", Answer)
    assert (found.trace_index, found.answer_index, found.seed, found.correct) == (1, 2, 2**62, True)
    assert found.answer_ids.dtype == np.int32 and found.answer_ids.tolist() == [3] and found.verdict is None


def test_columns_have_the_documented_types():
    assert str(schema_of(Score).field("logp_policy").type) == "list<item: float>"
    assert str(schema_of(Trace).field("seed").type) == "int64"
    assert str(schema_of(Trace).field("trace_index").type) == "int32"
    assert not schema_of(Score).field("logp_policy").nullable and schema_of(Score).field("num_correct").nullable


def test_another_record_type_or_a_broken_file_is_refused(tmp_path):
    write_records(tmp_path / "a.parquet", [answer(0)], Answer)
    with pytest.raises(ValueError, match="expected those of Trace"):
        read_records(tmp_path / "a.parquet", Trace)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet file"):
        read_records(tmp_path / "b.parquet", Answer)


def test_a_writer_that_dies_keeps_what_it_flushed_and_the_next_goes_on(tmp_path):
    killed = RecordWriter(tmp_path, Answer, flush_seconds=0.0)
    killed.append(answer(2), answer(1))
    killed.flush_seconds = 1e9
    killed.append(answer(5))  # never flushed
    following = RecordWriter(tmp_path, Answer, flush_seconds=0.0)
    assert indices(following) == [1, 2]
    following.append(answer(0))
    following.finish()
    assert [row.answer_index for row in read_records(following.file, Answer)] == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["data.parquet"]


def test_finish_killed_between_merging_and_removing_repeats_to_the_same_file(tmp_path):
    writer = RecordWriter(tmp_path, Answer, flush_seconds=0.0)
    writer.append(answer(1))
    part = next(tmp_path.glob("part-*")).read_bytes()
    writer.append(answer(0))
    writer.finish()
    (tmp_path / "part-000000.parquet").write_bytes(part)  # the removal had not come to it
    again = RecordWriter(tmp_path, Answer, flush_seconds=0.0)
    again.finish()
    assert [row.answer_index for row in read_records(again.file, Answer)] == [0, 1]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.parquet"
    write_records(file, [answer(0)], Answer)
    with pytest.raises(AttributeError, match="question_id"):
        write_records(file, [answer(1), object()], Answer)
    assert [row.answer_index for row in read_records(file, Answer)] == [0]
    assert [found.name for found in tmp_path.iterdir()] == ["a.parquet"]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    file = tmp_path / "manifest.json"
    script = "import os, pathlib, signal, sys\nfrom megavar.disk import atomic_write\n"
    script += "with atomic_write(pathlib.Path(sys.argv[1])) as aside:\n"
    script += "    aside.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", script, file], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_text() == "half"
    living = tmp_path / f".manifest.json.{socket.gethostname()}.{os.getppid()}.tmp"
    living.write_text("of a process that runs")
    with atomic_write(file) as aside:
        aside.write_text("whole")
    assert file.read_text() == "whole" and sorted(tmp_path.iterdir()) == sorted([file, living])


def test_a_value_that_an_enum_does_not_have_is_refused_with_the_file(tmp_path):
    row = Answer("a", 0, 0, 1, np.zeros(0, np.int32), "t", "stopped", 0)
    write_records(tmp_path / "a.parquet", [row], Answer)
    with pytest.raises(ValueError, match=r"a\.parquet contains the AnswerFinish 'stopped', expected one of stop, "):
        read_records(tmp_path / "a.parquet", Answer)


def test_enum_columns_are_strings_and_come_back_as_members(tmp_path):
    row = Answer("a", 0, 0, 1, np.zeros(0, np.int32), "t", AnswerFinish.STOP, 0)
    write_records(tmp_path / "a.parquet", [row], Answer)
    assert read_records(tmp_path / "a.parquet", Answer)[0].finish is AnswerFinish.STOP
    assert str(schema_of(Answer).field("finish").type) == "string"


def test_a_flipped_bit_anywhere_in_a_file_is_refused_or_changes_nothing(tmp_path):
    """The footer has no checksum: what flips there breaks its structure, changes a column, or is not looked at."""
    logps = np.array([-0.1, -1e-30], np.float32)
    rows = [Trace("a", k, 1, "policy", np.array([1, k], np.int32), np.arange(k, dtype=np.int32),
                  logps if k else None, "closed", k) for k in range(3)]  # fmt: skip
    write_records(tmp_path / "t.parquet", rows, Trace)
    whole, refused = (tmp_path / "t.parquet").read_bytes(), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "d.parquet").write_bytes(damaged)
        try:
            found = read_records(tmp_path / "d.parquet", Trace)
        except DamagedFile as error:
            assert "d.parquet" in str(error)
            refused += 1
        else:
            for row, expected in zip(found, rows, strict=True):
                for field in fields(Trace):
                    assert np.array_equal(getattr(row, field.name), getattr(expected, field.name)), (position, field)
    assert refused > len(whole) / 2


@pytest.mark.parametrize("content", [b"", b"PAR1", None])
def test_a_damaged_part_is_set_aside_and_its_records_are_made_again(tmp_path, content, caplog):
    writer = RecordWriter(tmp_path, Answer, flush_seconds=0.0)
    writer.append(answer(1))
    writer.append(answer(2))
    part = tmp_path / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-9] if content is None else content)
    again = RecordWriter(tmp_path, Answer, flush_seconds=0.0)
    assert indices(again) == [1]
    assert "part-000001.parquet.damaged, and what it held is made again" in caplog.text
    again.append(answer(2), answer(0))
    again.finish()
    assert [row.answer_index for row in read_records(again.file, Answer)] == [0, 1, 2]


def test_a_file_with_other_types_or_missing_values_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_records(tmp_path / "a.parquet", [answer(0)], Answer)
    table = pq.read_table(tmp_path / "a.parquet")
    for name, values, message in (
        ("trace_index", pa.array(["0"]), "column trace_index has type string and 0 nulls, expected int32 and none"),
        ("text", pa.array([None], pa.string()), "column text has type string and 1 nulls, expected string and none"),
    ):
        pq.write_table(table.set_column(table.schema.names.index(name), name, values), tmp_path / "b.parquet")
        with pytest.raises(DamagedFile, match=message):
            read_records(tmp_path / "b.parquet", Answer)


def test_a_full_disk_is_one_line_with_the_file_and_keeps_what_was_there(tmp_path):
    """A real small file system, which root may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk]).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        write_records(disk / "a.parquet", [answer(1)], Answer)
        texts = os.urandom(200_000).hex()
        big = Answer("q", 0, 0, 1, np.zeros(0, np.int32), texts, "stop", 0)
        with pytest.raises(
            ExplainedFailure, match=r"a\.parquet could not be written: .*No space left on device.*MB are free"
        ):
            write_records(disk / "a.parquet", [big], Answer)
        assert [row.answer_index for row in read_records(disk / "a.parquet", Answer)] == [1]
        assert [file.name for file in disk.iterdir()] == ["a.parquet"]
    finally:
        subprocess.run(["umount", disk], check=True)
