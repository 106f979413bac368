"""Samples traces from q and answers from the policy, from SGLang servers to disk; only what is missing is requested."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavar.config.schema import SampleConfig
from megavar.data.templates import Templates
from megavar.joins import answers_by_trace, by_trace, check_complete
from megavar.ranks import on_rank_zero
from megavar.records import Answer, AnswerFinish, Question, RecordWriter, Sampler, TokenIds, Trace, TraceFinish
from megavar.rollout.engine import Engine, GenerateRequest, Generation
from megavar.rollout.requests import run_requests
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import round_questions, sampler_folder, templates
from megavar.verifiers import NO_VERIFIER

logger = logging.getLogger(__name__)

QUESTIONS_WITH_LOGPS = 64
"""With `sample.keep_logps=some`."""

Key = tuple[str, int]


@dataclass(frozen=True)
class Sampling:
    """What all samples of a round share."""

    config: SampleConfig
    templates: Templates
    seed: int
    round_index: int


def execute(run: Run, service: RolloutService) -> None:
    """K traces a question from q or the policy, then n answers a trace from the policy."""
    on_rank_zero(lambda: _sample(run, service))


def _sample(run: Run, service: RolloutService) -> None:
    config, questions, prompts = run.config, round_questions(run), templates(run)
    sampling = Sampling(config.sample, prompts, config.seed, run.round_index)
    sampler = Sampler(config.sample.sampler)
    prompt_of = prompts.posterior_prompt if sampler == Sampler.POSTERIOR else prompts.policy_prompt

    async def traces(engine: Engine) -> list[Trace]:
        folder = run.round / "traces"
        return await sample_traces(engine, questions, prompt_of, sampler, config.sample.num_traces, sampling, folder)

    async def answers(engine: Engine) -> list[Answer]:
        num_answers, folder = config.sample.num_answers, run.round / "answers"
        return await sample_answers(engine, sampled, questions, num_answers, sampling, folder)

    sampled = service.run(sampler_folder(run), traces)
    num_closed = sum(trace.finish == TraceFinish.CLOSED for trace in sampled)
    if num_closed < len(sampled) / 2:
        logger.warning(
            "sample: only %d of %d traces are closed; the others get no answers and no weight "
            "(docs/troubleshooting.md#no-closed-traces).",
            num_closed,
            len(sampled),
        )
    service.run(run.reference, answers)


async def sample_policy(
    engine: Engine, questions: Sequence[Question], sampling: Sampling, num_traces: int, num_answers: int, folder: Path
) -> tuple[list[Trace], list[Answer]]:
    """Traces of the served policy and answers after them, into `folder`/traces and `folder`/answers."""
    prompt_of = sampling.templates.policy_prompt
    traces = await sample_traces(engine, questions, prompt_of, Sampler.POLICY, num_traces, sampling, folder / "traces")
    answers = await sample_answers(engine, traces, questions, num_answers, sampling, folder / "answers")
    return traces, answers


async def sample_traces(
    engine: Engine,
    questions: Sequence[Question],
    prompt_of: Callable[[Question], TokenIds],
    sampler: Sampler,
    num_traces: int,
    sampling: Sampling,
    folder: Path,
) -> list[Trace]:
    """Sample `num_traces` traces a question into `folder`.

    Args:
        engine: serving the model to sample from.
        prompt_of: the prompt that the sampler is shown.
        sampler: as recorded.

    Returns:
        All traces, those sampled by an earlier, interrupted call included.
    """
    config, templates = sampling.config, sampling.templates
    writer = RecordWriter(folder, Trace, config.flush_seconds)
    have = by_trace(writer.existing())
    close = templates.close_token
    missing = {
        question.id: [index for index in range(num_traces) if (question.id, index) not in have]
        for question in questions
    }

    def requests() -> Iterable[tuple[str, GenerateRequest]]:
        for index, question in enumerate(questions):
            if missing[question.id]:
                yield (
                    question.id,
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

    question_of = {question.id: question for question in questions}

    def keep(question_id: str, generations: list[Generation]) -> None:
        prompt_ids = prompt_of(question_of[question_id])
        writer.append(
            *(
                Trace(
                    question_id=question_id,
                    trace_index=index,
                    round=sampling.round_index,
                    sampler=sampler,
                    prompt_ids=prompt_ids,
                    trace_ids=generation.ids,
                    logp_engine=generation.logps,
                    finish=_trace_finish(generation, templates),
                    seed=generation.seed,
                )
                for index, generation in zip(missing[question_id], generations, strict=True)
            )
        )

    await _run(engine, list(requests()), keep, writer, f"{sampler} traces")
    sampled: list[Trace] = writer.finish()
    check_complete(sampled, ((question.id, k, -1) for question in questions for k in range(num_traces)), folder)
    return sampled


async def sample_answers(
    engine: Engine,
    traces: Sequence[Trace],
    questions: Sequence[Question],
    num_answers: int,
    sampling: Sampling,
    folder: Path,
) -> list[Answer]:
    """Sample `num_answers` answers after each closed trace, from the policy's prompt, into `folder`.

    Questions without a verifier get none: nothing would be learnt from them.

    The prompt is the policy's whoever sampled the trace, and the trace follows it as ids, so that the answers of a
    trace share their prefix on the server.
    """
    config = sampling.config
    writer = RecordWriter(folder, Answer, config.flush_seconds)
    have = answers_by_trace(writer.existing())
    judged = [question for question in questions if question.verifier != NO_VERIFIER]
    prompt_of = {question.id: sampling.templates.policy_prompt(question) for question in judged}
    answered = [trace for trace in traces if trace.finish == TraceFinish.CLOSED and trace.question_id in prompt_of]
    missing: dict[Key, list[int]] = {}
    requests: list[tuple[Key, GenerateRequest]] = []
    for trace in answered:
        key = (trace.question_id, trace.trace_index)
        present = {answer.answer_index for answer in have[key]}
        missing[key] = [index for index in range(num_answers) if index not in present]
        if missing[key]:
            request = GenerateRequest(
                np.concatenate([prompt_of[trace.question_id], trace.trace_ids]),
                max_tokens=config.max_answer_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=derive_seed(sampling.seed, "answer", trace.sampler, sampling.round_index, *key, missing[key][0]),
                num_samples=len(missing[key]),
                return_logps=False,
            )
            requests.append((key, request))

    def keep(key: Key, generations: list[Generation]) -> None:
        writer.append(
            *(
                Answer(*key, index, sampling.round_index, sample.ids, sample.text, _answer_finish(sample), sample.seed)
                for index, sample in zip(missing[key], generations, strict=True)
            )
        )

    await _run(engine, requests, keep, writer, "answers")
    sampled: list[Answer] = writer.finish()
    expected = ((trace.question_id, trace.trace_index, n) for trace in answered for n in range(num_answers))
    check_complete(sampled, expected, folder)
    return sampled


def derive_seed(*identity: str | int) -> int:
    """A distinct seed for each (run seed, sampler, round, question, trace, answer), in [0, 2^63)."""
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


async def _run(
    engine: Engine,
    requests: list[tuple[Key, GenerateRequest]] | list[tuple[str, GenerateRequest]],
    keep: Callable[..., None],
    writer: RecordWriter,
    description: str,
) -> None:
    """Run the requests; what finished is on disk even if some fail."""
    try:
        await run_requests(engine, requests, keep, description=description)
    finally:
        writer.flush()


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
