"""Verdicts reach their answers, survive SIGKILL, and never mix with those of other samples."""

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megavar.config.schema import VerifyConfig
from megavar.record_files import RecordWriter, read_records, write_records
from megavar.records import Answer, Judgement, Question
from megavar.stages.verify import verify_answers

QUESTIONS = [Question("a", "3+4", "7"), Question("b", "4+4", "8")]
CONFIG = VerifyConfig(num_workers=1, timeout_seconds=30.0)


def answer(question, trace, index, text):
    return Answer(question, trace, index, 1, np.array([trace, index], np.int32), text, "stop", 5)


ANSWERS = [
    answer("b", 1, 0, "\\boxed{7}"),
    answer("a", 0, 1, "none"),
    answer("a", 0, 0, "\\boxed{7}"),
    answer("b", 0, 0, "\\boxed{8}"),
]


def verified(questions, answers, folder):
    file = folder.parent / f"answers_{folder.name}.parquet"
    write_records(file, answers, Answer)
    verify_answers(lambda: questions, file, CONFIG, 0.0, folder)
    return read_records(folder / "data.parquet", Answer)


def test_every_answer_keeps_its_fields_and_gets_the_verdict_of_its_own_question(tmp_path):
    found = verified(QUESTIONS, ANSWERS, tmp_path)
    assert [(row.question_id, row.trace_index, row.answer_index, row.correct, row.verdict) for row in found] == [
        ("a", 0, 0, True, "correct"),
        ("a", 0, 1, False, "no_answer"),
        ("b", 0, 0, True, "correct"),
        ("b", 1, 0, False, "wrong"),
    ]
    sampled = {(row.question_id, row.trace_index, row.answer_index): row for row in ANSWERS}
    for row in found:
        was = sampled[row.question_id, row.trace_index, row.answer_index]
        assert (row.text, row.finish, row.seed, row.round) == (was.text, was.finish, was.seed, was.round)
        assert row.answer_ids.tolist() == was.answer_ids.tolist()


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from helpers import odd_verifiers
from megavar.config.schema import VerifyConfig
from megavar.record_files import write_records
from megavar.records import Answer, Question
from megavar.stages.verify import verify_answers
from megavar.verifiers import VERIFIERS

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    VERIFIERS["odd"] = odd_verifiers.record_and_kill_caller_once
    questions = [Question("q", "x", str(folder / "calls"), verifier="odd")]
    texts = ["0", "1", "2", "kill", "4", "5"]
    answers = [Answer("q", 0, i, 1, np.array([i], np.int32), text, "stop", 0) for i, text in enumerate(texts)]
    write_records(folder / "answers.parquet", answers, Answer)
    verify_answers(lambda: questions, folder / "answers.parquet", VerifyConfig(num_workers=1), 0.0, folder / "verified")
"""


def test_a_killed_run_goes_on_where_it_was_and_completes_the_file(tmp_path):
    (tmp_path / "calls").mkdir()
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent)])

    def run():
        command = [sys.executable, script, tmp_path]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, timeout=120).returncode

    assert run() == -signal.SIGKILL
    assert not (tmp_path / "verified" / "data.parquet").exists()
    assert run() == 0
    found = read_records(tmp_path / "verified" / "data.parquet", Answer)
    assert [row.verdict for row in found] == ["wrong", "wrong", "wrong", "correct", "wrong", "wrong"]
    assert [file.name for file in (tmp_path / "verified").iterdir()] == ["data.parquet"]
    calls = Counter(file.name.split("-")[0] for file in (tmp_path / "calls").glob("*-*"))
    assert calls == {"0": 1, "1": 1, "2": 1, "kill": 2, "4": 1, "5": 1}


def test_a_finished_folder_is_not_verified_again(tmp_path, monkeypatch):
    first = verified(QUESTIONS, ANSWERS[:1], tmp_path)
    monkeypatch.setattr("megavar.stages.verify.verify_all", lambda jobs, *_: assert_empty(jobs))
    (again,) = verified(QUESTIONS, ANSWERS[:1], tmp_path)
    assert again.verdict == first[0].verdict == "wrong"


def assert_empty(jobs):
    assert list(jobs) == []


@pytest.mark.parametrize("change", [{"answer_ids": np.array([9], np.int32)}, {"answer_index": 4}])
def test_verdicts_of_other_samples_are_refused(tmp_path, change):
    verified(QUESTIONS, ANSWERS[:1], tmp_path)
    with pytest.raises(
        ValueError, match="verdict of answer 0 of trace 1 of question 'b', which is not what was sampled"
    ):
        verified(QUESTIONS, [replace(ANSWERS[0], **change)], tmp_path)


@pytest.mark.parametrize(
    ("index", "digest", "named"),
    [(0, 1, "answer 0 of trace 1"), (7, 1, "answer 7 of trace 1")],
    ids=["sampled again", "not sampled"],
)
def test_verdicts_that_an_interrupted_call_left_of_other_samples_are_refused(tmp_path, index, digest, named):
    writer = RecordWriter(tmp_path / "out" / "judgements", Judgement, 0.0)
    writer.append(Judgement("b", 1, index, digest, "correct"))
    with pytest.raises(ValueError, match=f"verdict of {named} of question 'b', which is not what was sampled"):
        verified(QUESTIONS, ANSWERS, tmp_path / "out")
    assert not (tmp_path / "out" / "data.parquet").exists()


def test_unknown_questions_and_verifiers_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="answer 0 of trace 0 of question 'b' has no question"):
        verified(QUESTIONS[:1], ANSWERS, tmp_path)
    odd = [replace(question, verifier="odd") for question in QUESTIONS]
    with pytest.raises(ValueError, match="'odd' is unknown; use one of math"):
        verified(odd, ANSWERS, tmp_path)
    assert list(tmp_path.iterdir()) == []
