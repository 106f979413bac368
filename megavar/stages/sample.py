"""Samples traces from q and answers from the policy, from SGLang servers to disk; only what is missing is requested."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megavar.config.schema import SampleConfig
from megavar.data.question_tokens import QuestionTexts
from megavar.data.templates import Templates
from megavar.joins import Key, check_complete, identities
from megavar.ranks import on_rank_zero
from megavar.record_files import RecordFile, RecordWriter
from megavar.records import Answer, AnswerFinish, Question, Sampler, Trace, TraceFinish
from megavar.rollout.engine import Engine, GenerateRequest, Generation
from megavar.rollout.requests import run_requests
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import output, question_tokens, round_questions, sampler_folder, templates
from megavar.verifiers import NO_VERIFIER

logger = logging.getLogger(__name__)

QUESTIONS_WITH_LOGPS = 64
"""With `sample.keep_logps=some`."""

Asked = TypeVar("Asked", Question, Key)


@dataclass(frozen=True)
class Sampling:
    """What all samples of a round share."""

    config: SampleConfig
    templates: Templates
    texts: QuestionTexts
    """Token ids of the questions that are sampled."""
    seed: int
    round_index: int


def execute(run: Run, service: RolloutService) -> None:
    """K traces a question from q or the policy, then n answers a trace from the policy."""
    on_rank_zero(lambda: _sample(run, service))


def _sample(run: Run, service: RolloutService) -> None:
    config, questions = run.config, round_questions(run)
    sampling = Sampling(config.sample, templates(run), question_tokens(run), config.seed, run.round_index)
    sampler = Sampler(config.sample.sampler)
    folder = run.round / "traces"

    async def traces(engine: Engine) -> None:
        await sample_traces(engine, questions, sampler, config.sample.num_traces, sampling, folder)

    async def answers(engine: Engine) -> None:
        num_answers = config.sample.num_answers
        await sample_answers(engine, folder / "data.parquet", questions, num_answers, sampling, run.round / "answers")

    service.run(sampler_folder(run), traces)
    finishes = Counter(output(folder, Trace, "finish").table()["finish"].to_pylist())
    if finishes[TraceFinish.CLOSED] < finishes.total() / 2:
        logger.warning(
            "sample: only %d of %d traces are closed; the others get no answers and no weight "
            "(docs/troubleshooting.md#no-closed-traces).",
            finishes[TraceFinish.CLOSED],
            finishes.total(),
        )
    service.run(run.reference, answers)


async def sample_policy(
    engine: Engine, questions: Sequence[Question], sampling: Sampling, num_traces: int, num_answers: int, folder: Path
) -> None:
    """Traces of the served policy and answers after them, into `folder`/traces and `folder`/answers."""
    traces = folder / "traces"
    await sample_traces(engine, questions, Sampler.POLICY, num_traces, sampling, traces)
    await sample_answers(engine, traces / "data.parquet", questions, num_answers, sampling, folder / "answers")


async def sample_traces(
    engine: Engine,
    questions: Sequence[Question],
    sampler: Sampler,
    num_traces: int,
    sampling: Sampling,
    folder: Path,
) -> None:
    """Sample `num_traces` traces a question into `folder`; those of an earlier, interrupted call are kept.

    Args:
        engine: serving the model to sample from.
        sampler: which prompt it is shown, and what is recorded.
    """
    config, templates = sampling.config, sampling.templates
    prompt_of = sampling.texts.posterior_prompt if sampler == Sampler.POSTERIOR else sampling.texts.policy_prompt
    writer = RecordWriter(folder, Trace, config.flush_seconds)
    have = writer.existing_identities()
    close = templates.close_token
    missing = {
        question.id: [index for index in range(num_traces) if (question.id, index) not in have]
        for question in questions
    }

    def requests() -> Iterator[tuple[Question, GenerateRequest]]:
        for index, question in enumerate(questions):
            if missing[question.id]:
                yield (
                    question,
                    GenerateRequest(
                        prompt_of(question),
                        max_tokens=config.max_trace_tokens,
                        temperature=config.temperature,
                        top_p=config.top_p,
                        seed=derive_seed(
                            sampling.seed, sampler, sampling.round_index, question.id, missing[question.id][0]
                        ),
                        stop_token_ids=() if close is None else (close,),
                        stop=(templates.config.close_marker,) if close is None else (),
                        num_samples=len(missing[question.id]),
                        return_logps=config.keep_logps == "all" or index < QUESTIONS_WITH_LOGPS,
                    ),
                )

    def keep(question: Question, generations: list[Generation]) -> None:
        prompt_ids = prompt_of(question)
        writer.append(
            *(
                Trace(
                    question_id=question.id,
                    trace_index=index,
                    round=sampling.round_index,
                    sampler=sampler,
                    prompt_ids=prompt_ids,
                    trace_ids=generation.ids,
                    logp_engine=generation.logps,
                    finish=_trace_finish(generation, templates),
                    seed=generation.seed,
                )
                for index, generation in zip(missing[question.id], generations, strict=True)
            )
        )

    await _run(engine, requests(), keep, writer, f"{sampler} traces", sum(map(bool, missing.values())))
    ids = sorted(question.id for question in questions)
    expected = ((question_id, index, -1) for question_id in ids for index in range(num_traces))
    check_complete(identities(output(folder, Trace, "question_id", "trace_index")), expected, folder)


async def sample_answers(
    engine: Engine,
    traces: Path,
    questions: Sequence[Question],
    num_answers: int,
    sampling: Sampling,
    folder: Path,
) -> None:
    """Sample `num_answers` answers after each closed trace, from the policy's prompt, into `folder`.

    Questions without a verifier get none: nothing would be learnt from them.

    The prompt is the policy's whoever sampled the trace, and the trace follows it as ids, so that the answers of a
    trace share their prefix on the server.

    Args:
        traces: file of `Trace` records.
    """
    config = sampling.config
    writer = RecordWriter(folder, Answer, config.flush_seconds)
    have = writer.existing_identities()
    judged = {question.id: question for question in questions if question.verifier != NO_VERIFIER}

    def answered(*columns: str) -> Iterator[Trace]:
        """The traces that get answers."""
        for trace in RecordFile(traces, Trace, ("question_id", "trace_index", *columns, "finish")).rows():
            if trace.finish == TraceFinish.CLOSED and trace.question_id in judged:
                yield trace

    def missing(key: Key) -> list[int]:
        return [index for index in range(num_answers) if (*key, index) not in have]

    def requests() -> Iterator[tuple[Key, GenerateRequest]]:
        for trace in answered("sampler", "trace_ids"):
            key = (trace.question_id, trace.trace_index)
            if numbers := missing(key):
                prompt_ids = sampling.texts.policy_prompt(judged[trace.question_id])
                yield (
                    key,
                    GenerateRequest(
                        np.concatenate([prompt_ids, trace.trace_ids]),
                        max_tokens=config.max_answer_tokens,
                        temperature=config.temperature,
                        top_p=config.top_p,
                        seed=derive_seed(
                            sampling.seed, "answer", trace.sampler, sampling.round_index, *key, numbers[0]
                        ),
                        num_samples=len(numbers),
                        return_logps=False,
                    ),
                )

    def keep(key: Key, generations: list[Generation]) -> None:
        writer.append(
            *(
                Answer(*key, index, sampling.round_index, sample.ids, sample.text, _answer_finish(sample), sample.seed)
                for index, sample in zip(missing(key), generations, strict=True)
            )
        )

    total = sum(bool(missing((trace.question_id, trace.trace_index))) for trace in answered())
    await _run(engine, requests(), keep, writer, "answers", total)
    expected = ((trace.question_id, trace.trace_index, index) for trace in answered() for index in range(num_answers))
    check_complete(identities(output(folder, Answer, "question_id", "trace_index", "answer_index")), expected, folder)


def derive_seed(*identity: str | int) -> int:
    """A distinct seed for each (run seed, sampler, round, question, trace, answer), in [0, 2^63)."""
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


async def _run(
    engine: Engine,
    requests: Iterable[tuple[Asked, GenerateRequest]],
    keep: Callable[[Asked, list[Generation]], None],
    writer: RecordWriter[Any],
    description: str,
    total: int,
) -> None:
    """Run the requests and merge what they gave; what finished is on disk even if some fail."""
    try:
        await run_requests(engine, requests, keep, description=description, total=total)
    finally:
        writer.flush()
    writer.finish()


def _trace_finish(generation: Generation, templates: Templates) -> TraceFinish:
    """`closed` only if the trace ends with its close marker: one that ended its turn instead is not usable."""
    if generation.finish == "length":
        return TraceFinish.LENGTH
    close = templates.close_token
    if close is None:
        closed = templates.config.close_marker in generation.text
    else:
        closed = len(generation.ids) > 0 and int(generation.ids[-1]) == close
    return TraceFinish.CLOSED if closed and generation.finish == "stop" else TraceFinish.ABORTED


def _answer_finish(generation: Generation) -> AnswerFinish:
    return AnswerFinish.ABORTED if generation.finish == "abort" else AnswerFinish(generation.finish)
