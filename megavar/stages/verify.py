"""Gives every sampled answer its verdict, in worker processes that can be killed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megavar.config.schema import VerifyConfig
from megavar.progress import ProgressLine
from megavar.records import Answer, Question, RecordWriter, identity
from megavar.verifiers import get_verifier
from megavar.verifiers.pool import VerifyJob, verify_all


def verify_answers(
    questions: Sequence[Question], answers: Sequence[Answer], config: VerifyConfig, flush_seconds: float, folder: Path
) -> list[Answer]:
    """Fill `correct` and `verdict` of every answer; verdicts of an interrupted call are kept.

    Raises:
        ValueError: for an answer to an unknown question, a question with an unknown verifier, or a verdict in `folder`
            that was not given to one of `answers`.
    """
    writer = RecordWriter(folder, Answer, flush_seconds)
    verified = writer.existing()
    _refuse_others(verified, answers, folder)
    have = {identity(row) for row in verified}
    pending = [answer for answer in answers if identity(answer) not in have]
    question_of = {question.id: question for question in questions}
    jobs = [_job(answer, question_of) for answer in pending]
    with ProgressLine("verdicts") as progress:
        num_verified = 0

        def keep(index: int, verdict: str) -> None:
            nonlocal num_verified
            writer.append(replace(pending[index], correct=verdict == "correct", verdict=verdict))
            num_verified += 1
            progress.update(num_verified, len(jobs), "answers")

        try:
            verify_all(jobs, config.num_workers, config.timeout_seconds, keep)
        finally:
            writer.flush()
    writer.finish()
    return list(writer.existing())


def _job(answer: Answer, question_of: dict[str, Question]) -> VerifyJob:
    if answer.question_id not in question_of:
        raise ValueError(f"{_name(answer)} has no question in the question file; restore that, or sample again.")
    question = question_of[answer.question_id]
    return VerifyJob(get_verifier(question.verifier), answer.text, question.answer)


def _refuse_others(verified: Sequence[Answer], answers: Sequence[Answer], folder: Path) -> None:
    """Refuse verdicts of answers that were sampled again since: they would be joined to traces not theirs."""
    sampled = {identity(answer): answer.answer_ids for answer in answers}
    for row in verified:
        if identity(row) not in sampled or not np.array_equal(row.answer_ids, sampled[identity(row)]):
            raise ValueError(f"{folder} has a verdict of {_name(row)}, which is not what was sampled; remove {folder}.")


def _name(answer: Answer) -> str:
    return f"answer {answer.answer_index} of trace {answer.trace_index} of question {answer.question_id!r}"
