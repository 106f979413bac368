"""`megavar show`: every record as a person reads it, and the mistakes a person makes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.small_run import BASE, EVIL, ids, make_run, round_records
from tokenizers import Tokenizer

from megavar.cli import main
from megavar.record_files import RecordWriter, write_records
from megavar.records import Answer, Score, Trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("show")).round


def show(capsys, *arguments):
    code = main(["show", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "first_line", "row"),
    [
        ("traces", "16 Trace records of 4 questions", "prompt_ids: 2 ids: 339 279"),
        ("verified", "30 Answer records of 4 questions", "0 0 \\boxed{0} stop True correct"),
        ("scores", "16 Score records of 4 questions", "0 Σ -1.500 of 3 Σ -1.500 of 3 Σ -3.000 of 2 2 1 –"),
        ("weights", "16 Weight records of 4 questions", "0 0.0000 -0.6931 -0.6931 1.0000 ok"),
    ],
)
def test_the_type_of_a_file_is_told_by_its_columns(folder, capsys, monkeypatch, name, first_line, row):
    monkeypatch.setenv("COLUMNS", "100")
    for place in (folder / name, folder / name / "data.parquet"):
        code, printed = show(capsys, place, "--limit", 1)
        assert code == 0 and first_line in " ".join(printed.split())
        assert row in "\n".join(" ".join(line.split()) for line in printed.splitlines())
        assert "1 shown; --limit N or --question ID" in printed


def test_a_question_is_shown_with_all_its_records_and_no_others(folder, capsys):
    code, printed = show(capsys, folder / "weights", "--question", "mixed", "--limit", 1)
    assert code == 0 and printed.count(" ok ") == 4 and "easy" not in printed


def test_texts_are_not_read_as_markup(folder, capsys, tmp_path):
    code, printed = show(capsys, folder.parents[2] / "questions.jsonl", "--question", "mixed")
    assert code == 0 and EVIL in printed.replace("\n", "")
    answer = Answer("[red]q[/red]", 0, 0, 1, ids(1), "[/b][bold]x", "stop", 1)
    write_records(tmp_path / "a.parquet", [answer], Answer)
    code, printed = show(capsys, tmp_path / "a.parquet")
    assert code == 0 and "[red]q[/red]" in printed and "[/b][bold]x" in printed


def test_ids_become_text_with_a_tokenizer_and_are_shortened_without(tmp_path, capsys):
    trace = Trace("q", 0, 1, "gold", ids(*range(16, 26)), ids(16, 10, 17, 198, 341), None, "closed", 1)
    write_records(tmp_path / "t.parquet", [trace], Trace)
    code, printed = show(capsys, tmp_path / "t.parquet", "--model", BASE)
    assert code == 0 and "prompt_ids: 123456789" in printed and "1+2\n</think>" in printed
    code, printed = show(capsys, tmp_path / "t.parquet")
    assert code == 0 and "prompt_ids: 10 ids: 16 17 18 19 … 25" in printed and "logp_engine: –" in printed


def test_a_scored_trace_has_its_answer_marked_and_its_leakage_in_nats(folder, capsys):
    code, printed = show(capsys, folder / "traces", "--question", "easy", "--model", BASE)
    assert code == 0
    for text in ("12</think>", "1⟦2⟧3</think>", "1⟦2⟧34</think>", "1⟦2⟧345</think>"):
        assert f"trace_ids: {text}\n" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.startswith("leakage:")]
    assert lines == [
        f"leakage: 0.5000 nats (sampler: {0.5 + 0.1 * index:.4f}), tokens 1:2 of {3 + index}" for index in (1, 2, 3)
    ]
    code, printed = show(capsys, folder / "traces" / "data.parquet", "--question", "easy")
    assert code == 0 and printed.count("leakage: 0.5000 nats") == 3 and "⟦" not in printed


def test_a_mark_within_a_character_is_put_before_it(tmp_path, capsys):
    """One of two tokens of a character is said to be the answer."""
    tokens = np.array(Tokenizer.from_file(str(BASE / "tokenizer.json")).encode("1答2").ids, np.int32)
    assert len(tokens) == 5
    trace = Trace("q", 0, 1, "posterior", ids(16), tokens, None, "closed", 1)
    write_records(tmp_path / "traces" / "data.parquet", [trace], Trace)
    nothing = np.zeros(0, np.float32)
    score = Score("q", 0, 1, nothing, nothing, None, 1, 1, 2, 5, 1.0, 0.0)
    write_records(tmp_path / "scores" / "data.parquet", [score], Score)
    code, printed = show(capsys, tmp_path / "traces", "--model", BASE)
    assert code == 0 and "trace_ids: 1⟦答2⟧\n" in printed


def test_a_stage_at_work_shows_its_parts_each_record_once(tmp_path, capsys):
    answers = round_records()[1]
    writer = RecordWriter(tmp_path, Answer, 1e9)
    for chunk in (answers[4:6], answers[:5]):
        writer.append(*chunk)
        writer.flush()
    code, printed = show(capsys, tmp_path)
    assert code == 0 and "6 Answer records of 1 questions" in " ".join(printed.split())
    code, printed = show(capsys, tmp_path / "part-000000.parquet")
    assert code == 0 and "2 Answer records" in " ".join(printed.split())


def test_questions_are_shown_from_either_format_and_an_empty_file_is_no_error(tmp_path, capsys):
    rows = [{"id": "a", "question": "1+1", "answer": "2"}]
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    for name in ("q.jsonl", "q.parquet"):
        code, printed = show(capsys, tmp_path / name)
        assert code == 0 and "question: 1+1\nanswer: 2\nsolution: –" in printed
    write_records(tmp_path / "none.parquet", [], Trace)
    assert show(capsys, tmp_path / "none.parquet")[0] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "No file or folder"),
        (lambda file: file.write_bytes(b"text"), "is neither a Parquet file nor a .jsonl file of questions"),
        (lambda file: pq.write_table(pa.table({"a": [1]}), file), "has columns ['a'], which match no record type"),
        (
            lambda file: file.mkdir(),
            "contains neither data.parquet nor part-*.parquet; give a stage's folder or a file",
        ),
    ],
)
def test_a_missing_or_foreign_file_is_named(tmp_path, capsys, make, message):
    make(tmp_path / "x.parquet")
    code, printed = show(capsys, tmp_path / "x.parquet")
    assert code == 2 and message in printed and "Traceback" not in printed


def test_a_folder_of_stages_names_them(folder, capsys):
    code, printed = show(capsys, folder)
    assert code == 2 and "its folders with records are scores, traces, verified, weights" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "odd"], "no record of question 'odd'; it has records of cut, easy, hard"),
        (["--limit", "-1"], "--limit -1 is negative"),
        (["--model", "/nowhere"], "/nowhere has no tokenizer.json"),
    ],
)
def test_wrong_arguments_are_refused(folder, capsys, arguments, message):
    code, printed = show(capsys, folder / "weights", *arguments)
    assert code == 2 and message in printed


def test_argument_mistakes_exit_with_2_as_argparse_does(capsys):
    for arguments in (["show"], ["report"], ["show", "a", "--limit", "x"], ["sample"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
