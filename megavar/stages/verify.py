"""Gives every sampled answer its verdict, in worker processes that can be killed."""

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from megavar.config.schema import VerifyConfig
from megavar.joins import OUTPUTS_DO_NOT_MATCH, Identity, by_question, check_complete, identities
from megavar.progress import ProgressLine
from megavar.ranks import Tally, claimed, from_rank_zero, is_rank_zero, node, on_every_node, on_rank_zero
from megavar.record_files import RecordFile, RecordFileWriter, RecordWriter, lists
from megavar.records import Answer, Judgement, Question, TokenIds, Verdict
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import round_questions
from megavar.verifiers import check_verifiers, get_verifier, ground_truth
from megavar.verifiers.base import Verifier
from megavar.verifiers.pool import VerifyJob, verify_all

logger = logging.getLogger(__name__)

MOST_UNJUDGED = 0.02
"""Share of answers with an error or time-out as verdict above which a run is warned."""
_KEY = ("question_id", "trace_index", "answer_index")


def execute(run: Run, service: RolloutService) -> None:
    """A verdict for every answer of the round."""
    answers, flush_seconds = run.round / "answers" / "data.parquet", run.config.sample.flush_seconds
    verify_answers(lambda: round_questions(run), answers, run.config.verify, flush_seconds, run.round / "verified")


def verify_answers(
    questions: Callable[[], Sequence[Question]], answers: Path, config: VerifyConfig, flush_seconds: float, folder: Path
) -> None:
    """Write the records of the file `answers` with `correct` and `verdict` to `folder`; every rank calls it.

    Each node judges the answers that it claims, and rank 0 merges. Verdicts of an interrupted call are reused; they are
    in the folder `judgements` in it until all answers have one.

    Args:
        questions: of the answers; called where they are needed.

    Raises:
        ValueError: for an answer to an unknown question, a question with an unknown verifier, or a verdict in `folder`
            that is of none of these answers.
    """
    finished, judgements = folder / "data.parquet", folder / "judgements"
    judges = cache(lambda: _judges(answers, questions(), config.plugins))

    def begin() -> bool:
        if finished.exists():
            _refuse_others(*(RecordFile(file, Answer, (*_KEY, "answer_ids")) for file in (answers, finished)))
            return False
        judges()
        RecordWriter(judgements, Judgement, flush_seconds).finish()
        return True

    def judge() -> None:
        known = RecordFile(judgements / "data.parquet", Judgement)
        pending = _Pending(answers, known, judges())
        writer, tally = RecordWriter(judgements, Judgement, flush_seconds, node()), Tally(str(folder))
        with ProgressLine("verdicts", pending.num_judged, show=is_rank_zero()) as progress:

            def keep(index: int, verdict: str) -> None:
                writer.append(Judgement(*pending.pop(index), verdict))
                progress.update(pending.num_judged + tally.add(1), pending.num_answers, "answers")

            try:
                verify_all(pending.jobs(), config.num_workers, config.timeout_seconds, keep)
            finally:
                writer.flush()

    if from_rank_zero(begin):
        on_every_node(judge)
        on_rank_zero(lambda: _merge(answers, RecordWriter(judgements, Judgement, flush_seconds), finished))


def _merge(answers: Path, writer: RecordWriter[Judgement], finished: Path) -> None:
    writer.finish()
    judgements = RecordFile(writer.file, Judgement)
    check_complete(identities(judgements), identities(RecordFile(answers, Answer, _KEY)), finished.parent)
    verdicts: Counter[str] = Counter()
    with RecordFileWriter(finished, Answer) as verified:
        for some_answers, some_judgements in by_question(RecordFile(answers, Answer), judgements):
            verdict = some_judgements["verdict"]
            verdicts.update({row["values"]: row["counts"] for row in pc.value_counts(verdict).to_pylist()})
            judged = some_answers.drop_columns(["correct", "verdict"])
            judged = judged.append_column("correct", pc.equal(verdict, str(Verdict.CORRECT)))
            verified.write(judged.append_column("verdict", verdict))
    shutil.rmtree(writer.folder)
    _warn_of_errors(verdicts)


class _Pending:
    """The answers that have no verdict yet, as jobs, read as they are needed.

    Raises:
        ValueError: if a verdict is of none of the answers.
    """

    def __init__(
        self, answers: Path, judgements: RecordFile[Judgement], judge_of: dict[str, tuple[Verifier, str]]
    ) -> None:
        self._answers, self._judgements, self._judge_of = answers, judgements, judge_of
        self.num_answers, self.num_judged = len(RecordFile(answers, Answer)), len(judgements)
        self._asked: dict[int, tuple[str, int, int, int]] = {}

    def jobs(self) -> Iterator[VerifyJob]:
        """One for each, in the order of the file."""
        answers = RecordFile(self._answers, Answer, (*_KEY, "answer_ids", "text"))
        index = 0
        tables = by_question(answers, self._judgements)
        for some_answers, some_judgements in claimed(tables, f"verify {self._judgements.file}"):
            digest_of = dict(_digests(some_judgements))
            texts = some_answers["text"].to_pylist()
            for (key, digest), text in zip(_digests(some_answers), texts, strict=True):
                if key in digest_of:
                    if digest_of.pop(key) != digest:
                        raise _another_answer(self._judgements.file.parent, key)
                    continue
                judge, gold = self._judge_of[key[0]]
                self._asked[index] = (*key, digest)
                index += 1
                yield VerifyJob(judge, text, gold)
            if digest_of:
                raise _another_answer(self._judgements.file.parent, next(iter(digest_of)))

    def pop(self, index: int) -> tuple[str, int, int, int]:
        """Identity and digest of the answer of a job."""
        return self._asked.pop(index)


def _digests(table: pa.Table) -> Iterator[tuple[Identity, int]]:
    """Identity and digest of the rows of a table of answers, or of judgements."""
    keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    if "answer_digest" in table.schema.names:
        yield from zip(keys, table["answer_digest"].to_pylist(), strict=True)
        return
    values, starts = lists(table["answer_ids"])
    for key, start, stop in zip(keys, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield key, _digest(values[start:stop])


def _digest(ids: TokenIds) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)


def _warn_of_errors(verdicts: Counter[str]) -> None:
    """An answer without a judgement counts as wrong: many of them bias the accuracy without a trace in any curve."""
    judged = (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER)
    others = Counter({verdict: count for verdict, count in verdicts.items() if verdict not in judged})
    if others.total() > MOST_UNJUDGED * verdicts.total():
        verdict, count = others.most_common(1)[0]
        logger.warning(
            "verify: %d of %d answers have no judgement and count as wrong, %d of them %r "
            "(docs/troubleshooting.md#verdicts-are-errors-or-time-outs).",
            others.total(),
            verdicts.total(),
            count,
            verdict,
        )


def _judges(answers: Path, questions: Sequence[Question], plugins: Sequence[str]) -> dict[str, tuple[Verifier, str]]:
    """Verifier and ground truth of the questions of these answers."""
    judge_of, question_of = {}, {question.id: question for question in questions}
    for table in RecordFile(answers, Answer, _KEY).tables():
        for question_id in table["question_id"].unique().to_pylist():
            question = question_of.get(question_id)
            if question is None:
                row = pc.index(table["question_id"], question_id).as_py()
                key = tuple(table[name][row].as_py() for name in _KEY)
                raise ValueError(f"{_name(key)} has no question in the question file; restore that, or sample again.")
            judge_of[question_id] = (get_verifier(question.verifier, plugins), ground_truth(question))
    check_verifiers((question_of[question_id].verifier for question_id in judge_of), plugins)
    return judge_of


def _refuse_others(answers: RecordFile[Answer], verified: RecordFile[Answer]) -> None:
    """Refuse verdicts of answers that were sampled again since: they would be joined to traces not theirs."""
    for some_answers, some_verified in by_question(answers, verified):
        digest_of = dict(_digests(some_answers))
        for key, digest in _digests(some_verified):
            if digest_of.pop(key, None) != digest:
                raise _another_answer(verified.file.parent, key)
        if digest_of:
            raise ValueError(
                f"{verified.file} lacks the verdict of {_name(next(iter(digest_of)))}; remove {verified.file.parent} "
                f"({OUTPUTS_DO_NOT_MATCH})."
            )


def _another_answer(folder: Path, key: Identity) -> ValueError:
    return ValueError(
        f"{folder} has a verdict of {_name(key)}, which is not what was sampled; remove {folder} "
        f"({OUTPUTS_DO_NOT_MATCH})."
    )


def _name(key: Identity) -> str:
    return f"answer {key[2]} of trace {key[1]} of question {key[0]!r}"
