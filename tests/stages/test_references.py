"""Reference answers are judged by their own verifiers before a run learns from them."""

import json
import logging
import re
from pathlib import Path

import pytest
from helpers import odd_verifiers

from megavar.config.load import load_config
from megavar.config.schema import VerifyConfig
from megavar.data.questions import read_questions
from megavar.runs.folder import Run
from megavar.stages import references
from megavar.stages.check import check_run, usable_questions
from megavar.stages.references import bad_references
from megavar.stages.run_files import train_questions
from megavar.verifiers import VERIFIERS

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
GOOD = {"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}
SOLUTION = "\n\nThe final answer is \\boxed{{{answer}}}."


def write(folder, *rows):
    file = folder / "t.jsonl"
    file.write_text("\n".join(json.dumps({**GOOD, "id": f"q{index}", **row}) for index, row in enumerate(rows)))
    return file


def judge(file, template=SOLUTION, **verify):
    return bad_references(file, read_questions(file), VerifyConfig(**verify), template)


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "\\boxed{4}"},
        {"answer": "\\frac12", "solution": "so \\boxed{0.5}"},
        {"answer": "C", "verifier": "choice"},
        {"answer": "C", "question": "Which?\nA. 1\nB. 2\nC. 3", "solution": "\\boxed{3}", "verifier": "choice"},
        {"answer": "grey | gray", "verifier": "text"},
        {"answer": '{"target": 6, "nums": [1, 2, 3]}', "solution": "\\boxed{1+2+3}", "verifier": "countdown"},
        {"answer": '{"inputs": ["1"], "outputs": ["2"]}', "verifier": "code"},
        {"answer": "?", "verifier": "none"},
        {"answer": "\\text{even}"},
        {"answer": "5 \\text{ km}", "solution": "\\boxed{5000 \\text{ m}}"},
    ],
)
def test_good_references(tmp_path, row):
    assert judge(write(tmp_path, row)) == {}


@pytest.mark.parametrize(
    ("row", "kind", "description"),
    [
        ({"answer": "3", "solution": "\\boxed{2}"}, "not correct by their own verifier", "`solution` is wrong"),
        ({"answer": "3", "solution": "no idea"}, "without a final answer", "finds no answer in `solution`"),
        ({"answer": "He has <<2+2=4>>4.\n#### 4"}, "whole solutions as answer", "put '4', which follows the ####"),
        ({"answer": "\\boxed{\\boxed{4}}"}, "answers with several boxes", "more than one box"),
        ({"answer": "?"}, "empty answers", "says nothing"),
        ({"answer": "\\text{}"}, "empty answers", "says nothing"),
        ({"answer": "\\text{ }", "solution": "\\boxed{2}"}, "empty answers", "says nothing"),
        ({"answer": "the function grows without bound as soon as the argument is larger than that"}, "prose as answer",
         r"prose of 1\d words"),
        ({"answer": "12", "verifier": "choice"}, "not to be judged", "is not the letter of an option"),
        ({"answer": "98", "verifier": "countdown"}, "not to be judged", "no target|cannot be read"),
        ({"answer": '{"target": 6, "nums": [1, 2, 3]}', "verifier": "countdown"}, "not correct by their own verifier",
         "as templates.solution writes it is wrong"),
    ],
)  # fmt: skip
def test_bad_references(tmp_path, row, kind, description):
    found = judge(write(tmp_path, {}, row))
    assert list(found) == ["q1"] and found["q1"][0] == kind
    assert re.search(description, found["q1"][1])


def config_of(folder, *overrides):
    (folder / "run.yaml").write_text(
        f"name: a\nruns_dir: {folder}/runs\nmodel: {BASE}\n"
        f"data: {{train: {folder}/t.jsonl, max_sequence_tokens: 160}}\n"
        "precision: {recipe: fp32}\nsample: {max_trace_tokens: 80, max_answer_tokens: 16}\n"
        "rollout: {mode: external, urls: [http://127.0.0.1:9]}\n"
    )
    return load_config(folder / "run.yaml", list(overrides))


def test_all_bad_rows_are_counted_and_the_first_ten_shown(tmp_path):
    write(tmp_path, {}, *[{"answer": "3", "solution": "\\boxed{2}"}] * 12, {"answer": "?"})
    with pytest.raises(ValueError) as refused:
        check_run(config_of(tmp_path), 1)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"{tmp_path}/t.jsonl, line 2: question 'q1': `solution` is wrong")
    assert len(lines) == 11 and "line 11: question 'q10'" in lines[9]
    assert lines[10] == (
        "13 of 14 rows are bad: 12 not correct by their own verifier, 1 empty answers. The first 10 are shown. "
        "Correct them, or leave them out with data.on_bad_reference=drop."
    )


def test_questions_that_are_trained_on_and_held_out_are_said(tmp_path, caplog):
    write(tmp_path, {"question": "7+5"}, {"question": "What is 2+2?"}, {"question": "8+5"})
    (tmp_path / "e.jsonl").write_text(json.dumps(GOOD | {"question": "what is  $2+2$"}))
    with caplog.at_level(logging.WARNING):
        check_run(config_of(tmp_path, f"data.eval={tmp_path}/e.jsonl"), 1)
    assert f"1 of 3 questions of data.train={tmp_path}/t.jsonl" in caplog.text and "(q1)" in caplog.text
    assert f"--exclude {tmp_path}/e.jsonl" in caplog.text


def test_bad_rows_are_left_out_if_that_is_asked_for(tmp_path, caplog):
    write(tmp_path, {}, {"answer": "?"}, {})
    config = config_of(tmp_path, "data.on_bad_reference=drop")
    with caplog.at_level(logging.WARNING):
        check_run(config, 1)
        assert [question.id for question in usable_questions(config, config.data.train)] == ["q0", "q2"]
    assert "line 2: question 'q1': `answer` is '?', which says nothing" in caplog.text
    write(tmp_path, {"answer": "?"})
    with pytest.raises(ValueError, match="no question has a reference answer that is correct"):
        check_run(config, 1)


def test_a_run_keeps_to_what_it_left_out_first(tmp_path):
    write(tmp_path, {}, {"answer": "?"}, {})
    run = Run(config_of(tmp_path, "data.on_bad_reference=drop"))
    assert [question.id for question in train_questions(run)] == ["q0", "q2"]
    (kept,) = (run.folder / "left_out").iterdir()
    kept.write_text('["q0"]')  # as by an older verifier
    assert [question.id for question in train_questions(run)] == ["q1", "q2"]
    kept.write_text("[")
    with pytest.raises(ValueError, match=r"left_out/.*json is damaged .*remove it"):
        train_questions(run)


def test_files_that_were_judged_are_not_judged_again(tmp_path, monkeypatch):
    file = write(tmp_path, {"answer": "31", "solution": "\\boxed{32}"})
    found = judge(file)
    monkeypatch.setattr(references, "verify_all", None)
    assert judge(file) == found and list(found) == ["q0"]
    with pytest.raises(TypeError):  # another template is another question
        judge(file, "so \\boxed{{{answer}}}")
    monkeypatch.undo()
    write(tmp_path, {"answer": "31", "solution": "\\boxed{31}"})
    assert judge(file) == {}


def test_a_damaged_cache_is_judged_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path, {"answer": "41", "solution": "\\boxed{42}"})
    found = judge(file)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    for damage in ("", "[1]", '{"q0": 1}'):
        kept.write_text(damage)
        assert judge(file) == found


def test_a_verifier_that_takes_too_long_is_an_error_whatever_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "odd", odd_verifiers.sleep_then_match)
    file = write(tmp_path, {"solution": "50 x", "verifier": "odd"})
    with pytest.raises(ValueError, match=r"did not judge the reference answer within verify\.timeout_seconds=0.5"):
        judge(file, timeout_seconds=0.5)
