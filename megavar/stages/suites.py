"""What a model does on a suite of questions: sampled, judged and counted, within a run or without one."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from megavar.config.schema import EvaluationConfig, VerifyConfig
from megavar.evaluation.majority import is_open, joined, majority
from megavar.evaluation.results import Outcomes, Results, SuiteResults, compare, write_results
from megavar.joins import by_question
from megavar.record_files import RecordFile
from megavar.records import Answer, AnswerFinish, Question, Trace, TraceFinish, Verdict
from megavar.rollout.service import RolloutService
from megavar.stages.sample import Sampling, sample_policy
from megavar.stages.verify import verify_answers
from megavar.verifiers import get_verifier, ground_truth
from megavar.verifiers.final_answer import last_box, stated_answer
from megavar.verifiers.pool import VerifyJob, verify_all

RESULTS = "results.json"
_COMPARED = ("math", "choice", "text")
"""Verifiers that can compare two answers; of the others, equal answers have equal texts."""
_MAX_CHARACTERS = 1000
"""Of an answer that votes; of a longer one, both ends."""


@dataclass(frozen=True)
class Suite:
    """A file of questions, and what was sampled on it."""

    name: str
    file: str
    folder: Path
    """Has a folder for each model, with traces/, answers/ and verified/."""


def answer_suite(
    service: RolloutService, model: Path, sampling: Sampling, config: EvaluationConfig, folder: Path
) -> None:
    """`eval.num_samples` traces a question, an answer after each, and its verdict, into `folder`; every rank calls it.

    What an earlier, interrupted call has written is kept.

    Args:
        sampling: loads the questions of the suite, each with a verifier.
    """
    sample_policy(service, model, config.eval.num_samples, 1, sampling, folder)
    answers, flush_seconds = folder / "answers" / "data.parquet", config.sample.flush_seconds
    verify_answers(lambda: sampling.loaded.questions, answers, config.verify, flush_seconds, folder / "verified")


def compare_models(
    suite: Suite, questions: Sequence[Question], models: Sequence[str], config: EvaluationConfig
) -> SuiteResults:
    """The results of models that have answered a suite; on rank 0."""
    outcomes_of = {name: read_outcomes(suite.folder / name, questions, config) for name in models}
    settings = config.eval
    ks = settings.pass_at or [settings.num_samples]
    return compare(suite.file, outcomes_of, settings.num_samples, ks, settings.num_bootstrap, config.seed)


def write_suites(
    suites: Mapping[str, SuiteResults], models: Mapping[str, Path], config: EvaluationConfig, folder: Path
) -> Results:
    """Write results.json."""
    folders = {name: str(model) for name, model in models.items()}
    results = Results(config.eval.num_samples, config.eval.num_bootstrap, config.seed, folders, dict(suites))
    write_results(results, folder / RESULTS)
    return results


def read_outcomes(folder: Path, questions: Sequence[Question], config: EvaluationConfig) -> Outcomes:
    """Count what `answer_suite` wrote.

    A sample whose trace or answer was cut counts as wrong. So does one without an answer, which has no vote either.
    """
    num_samples = config.eval.num_samples
    tokens, truncated, votes_of = (
        defaultdict[str, int](int),
        defaultdict[str, int](int),
        defaultdict[str, _Votes](_Votes),
    )
    question_of = {question.id: question for question in questions}
    traces = RecordFile(
        folder / "traces" / "data.parquet", Trace, ("question_id", "trace_index", "trace_ids", "finish")
    )
    columns = ("question_id", "trace_index", "answer_index", "answer_ids", "text", "finish", "verdict")
    answers = RecordFile(folder / "verified" / "data.parquet", Answer, columns)
    for some_traces, some_answers in by_question(traces, answers):
        for table, ids in ((some_traces, "trace_ids"), (some_answers, "answer_ids")):
            lengths = pc.list_value_length(table[ids]).to_pylist()
            rows = zip(table["question_id"].to_pylist(), lengths, table["finish"].to_pylist(), strict=True)
            for question_id, length, finish in rows:
                tokens[question_id] += length
                truncated[question_id] += finish in (TraceFinish.LENGTH, AnswerFinish.LENGTH)
        texts = (some_answers[name].to_pylist() for name in ("question_id", "verdict", "text"))
        for question_id, verdict, text in zip(*texts, strict=True):
            votes_of[question_id].add(question_of[question_id], verdict, text)
    _join_wrong(votes_of, question_of, config.verify)

    def array(values: Iterator[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.fromiter(values, np.float64, len(questions))

    votes = [votes_of[question.id] for question in questions]
    return Outcomes(
        num_correct=array(some.num_correct for some in votes),
        majority=array(majority(some.num_correct, some.wrong) for some in votes),
        tokens=array(tokens[question.id] / num_samples for question in questions),
        truncated=array(truncated[question.id] / num_samples for question in questions),
    )


class _Votes:
    """What the samples of one question answer."""

    def __init__(self) -> None:
        self.num_correct = 0
        self.of_text: Counter[str] = Counter()
        """The wrong answers."""
        self.same: list[tuple[int, int]] = []
        """Pairs of these, by their order, that the verifier calls equal."""

    def add(self, question: Question, verdict: str, text: str) -> None:
        """Count an answer."""
        if verdict == Verdict.CORRECT:
            self.num_correct += 1
        elif verdict != Verdict.NO_ANSWER:
            self.of_text[_final_answer(question, text)] += 1

    @property
    def wrong(self) -> list[int]:
        """Votes for each wrong answer."""
        return joined(list(self.of_text.values()), self.same)


def _final_answer(question: Question, text: str) -> str:
    """The part of an answer that is compared, in one line."""
    if question.verifier in (*_COMPARED, "countdown"):
        box = last_box(text)
        lines = [line for line in text.splitlines() if line.strip()]
        text = (stated_answer(text) or "".join(lines[-1:])) if box is None else box
    text = " ".join(text.split())
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else text[:half] + text[-half:]


def _join_wrong(votes_of: Mapping[str, _Votes], question_of: Mapping[str, Question], config: VerifyConfig) -> None:
    """Ask the verifiers which wrong answers are equal, where maj@n depends on it."""
    asked: list[tuple[_Votes, tuple[int, int]]] = []

    def jobs() -> Iterator[VerifyJob]:
        for question_id, votes in votes_of.items():
            question = question_of[question_id]
            if question.verifier not in _COMPARED or not is_open(votes.num_correct, list(votes.of_text.values())):
                continue
            verifier = get_verifier(question.verifier)
            for (index, known), (other, answer) in combinations(enumerate(votes.of_text), 2):
                asked.append((votes, (index, other)))
                yield VerifyJob(verifier, f"\\boxed{{{answer}}}", ground_truth(replace(question, answer=known)))

    def keep(index: int, verdict: str) -> None:
        votes, pair = asked[index]
        if verdict == Verdict.CORRECT:
            votes.same.append(pair)

    verify_all(jobs(), config.num_workers, config.timeout_seconds, keep)
