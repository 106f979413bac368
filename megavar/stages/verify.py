"""Gives every sampled answer its verdict, in worker processes that can be killed."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megavar.config.schema import VerifyConfig
from megavar.joins import OUTPUTS_DO_NOT_MATCH, check_complete
from megavar.progress import ProgressLine
from megavar.ranks import on_rank_zero
from megavar.records import Answer, Question, RecordWriter, Verdict, identity
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import read_output, round_questions
from megavar.verifiers import check_verifiers, get_verifier, ground_truth
from megavar.verifiers.base import Verifier
from megavar.verifiers.pool import VerifyJob, verify_all

logger = logging.getLogger(__name__)

MOST_UNJUDGED = 0.02
"""Share of answers with an error or time-out as verdict above which a run is warned."""


def execute(run: Run, service: RolloutService) -> None:
    """A verdict for every answer of the round."""

    def work() -> None:
        answers, flush_seconds = read_output(run.round / "answers", Answer), run.config.sample.flush_seconds
        verify_answers(round_questions(run), answers, run.config.verify, flush_seconds, run.round / "verified")

    on_rank_zero(work)


def verify_answers(
    questions: Sequence[Question], answers: Sequence[Answer], config: VerifyConfig, flush_seconds: float, folder: Path
) -> list[Answer]:
    """Fill `correct` and `verdict` of every answer; existing verdicts of an interrupted call are reused.

    Raises:
        ValueError: for an answer to an unknown question, a question with an unknown verifier, or a verdict in `folder`
            that is of none of `answers`.
    """
    writer = RecordWriter(folder, Answer, flush_seconds)
    verified = writer.existing()
    _refuse_others(verified, answers, folder)
    have = {identity(row) for row in verified}
    pending = [answer for answer in answers if identity(answer) not in have]
    judge_of = _judges(pending, {question.id: question for question in questions}, config.plugins)
    jobs = (VerifyJob(judge, answer.text, gold) for answer in pending for judge, gold in [judge_of[answer.question_id]])
    with ProgressLine("verdicts") as progress:
        num_verified = 0

        def keep(index: int, verdict: str) -> None:
            nonlocal num_verified
            writer.append(replace(pending[index], correct=verdict == Verdict.CORRECT, verdict=verdict))
            num_verified += 1
            progress.update(num_verified, len(pending), "answers")

        try:
            verify_all(jobs, config.num_workers, config.timeout_seconds, keep)
        finally:
            writer.flush()
    results: list[Answer] = writer.finish()
    check_complete(results, map(identity, answers), folder)
    _warn_of_errors(results)
    return results


def _warn_of_errors(results: Sequence[Answer]) -> None:
    """An answer without a judgement counts as wrong: many of them bias the accuracy without a trace in any curve."""
    judged = (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)
    others = Counter(str(answer.verdict) for answer in results if answer.verdict not in judged)
    if others.total() > MOST_UNJUDGED * len(results):
        verdict, count = others.most_common(1)[0]
        logger.warning(
            "verify: %d of %d answers have no judgement and count as wrong, %d of them %r "
            "(docs/troubleshooting.md#verdicts-are-errors-or-time-outs).",
            others.total(),
            len(results),
            count,
            verdict,
        )


def _judges(
    answers: Sequence[Answer], question_of: dict[str, Question], plugins: Sequence[str]
) -> dict[str, tuple[Verifier, str]]:
    """Verifier and ground truth of the questions of these answers."""
    judge_of = {}
    for answer in answers:
        if answer.question_id in judge_of:
            continue
        question = question_of.get(answer.question_id)
        if question is None:
            raise ValueError(f"{_name(answer)} has no question in the question file; restore that, or sample again.")
        judge_of[question.id] = (get_verifier(question.verifier, plugins), ground_truth(question))
    check_verifiers((question_of[question_id].verifier for question_id in judge_of), plugins)
    return judge_of


def _refuse_others(verified: Sequence[Answer], answers: Sequence[Answer], folder: Path) -> None:
    """Refuse verdicts of answers that were sampled again since: they would be joined to traces not theirs."""
    sampled = {identity(answer): answer.answer_ids for answer in answers}
    for row in verified:
        if identity(row) not in sampled or not np.array_equal(row.answer_ids, sampled[identity(row)]):
            raise ValueError(
                f"{folder} has a verdict of {_name(row)}, which is not what was sampled; remove {folder} "
                f"({OUTPUTS_DO_NOT_MATCH})."
            )


def _name(answer: Answer) -> str:
    return f"answer {answer.answer_index} of trace {answer.trace_index} of question {answer.question_id!r}"
