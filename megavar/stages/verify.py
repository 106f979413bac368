"""Gives every sampled answer its verdict, in worker processes that can be killed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from megavar.config.schema import VerifyConfig
from megavar.records import Answer, Question, RecordWriter, identity
from megavar.verifiers import get_verifier
from megavar.verifiers.pool import VerifyJob, verify_all


def verify_answers(
    questions: Sequence[Question], answers: Sequence[Answer], config: VerifyConfig, flush_seconds: float, folder: Path
) -> list[Answer]:
    """Fill `correct` and `verdict` of every answer; verdicts of an interrupted call are kept."""
    writer = RecordWriter(folder, Answer, flush_seconds)
    have = {identity(row) for row in writer.existing()}
    question_of = {question.id: question for question in questions}
    pending = [answer for answer in answers if identity(answer) not in have]
    jobs = [
        VerifyJob(
            get_verifier(question_of[answer.question_id].verifier),
            answer.text,
            question_of[answer.question_id].answer,
        )
        for answer in pending
    ]
    with Progress() as progress:
        task = progress.add_task("verdicts", total=len(jobs))

        def keep(index: int, verdict: str) -> None:
            writer.append(replace(pending[index], correct=verdict == "correct", verdict=verdict))
            progress.advance(task)

        try:
            verify_all(jobs, config.num_workers, config.timeout_seconds, keep)
        finally:
            writer.flush()
    writer.finish()
    return list(writer.existing())
