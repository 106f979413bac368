"""Samples traces from q and answers from the policy, from SGLang servers to disk; only what is missing is requested."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from megavar.config.schema import SampleConfig
from megavar.data.question_tokens import QuestionTexts
from megavar.data.templates import Templates
from megavar.joins import Identity, Key, check_complete, identities
from megavar.ranks import Tally, claimed, is_rank_zero, node, on_rank_zero
from megavar.record_files import RecordFile, RecordWriter
from megavar.records import Answer, AnswerFinish, Question, Record, Sampler, Trace, TraceFinish, identity_columns
from megavar.rollout.engine import Engine, GenerateRequest, Generation
from megavar.rollout.requests import run_requests
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import output, question_tokens, round_questions, sampler_folder, templates
from megavar.verifiers import NO_VERIFIER

logger = logging.getLogger(__name__)

QUESTIONS_WITH_LOGPS = 64
"""With `sample.keep_logps=some`."""
BLOCK_REQUESTS = 8
"""That a node claims at once."""

Item = TypeVar("Item")


class Loaded(NamedTuple):
    """What is sampled."""

    questions: Sequence[Question]
    templates: Templates
    texts: QuestionTexts
    """Of these questions."""


class Sampling:
    """What all samples of a round share.

    Args:
        config: sample section.
        seed: of the run.
        round_index: as recorded; seeds differ by it.
        load: called where something is sampled.
    """

    def __init__(self, config: SampleConfig, seed: int, round_index: int, load: Callable[[], Loaded]) -> None:
        self.config, self.seed, self.round_index = config, seed, round_index
        self._load = load

    @cached_property
    def loaded(self) -> Loaded:
        """See `Loaded`."""
        return self._load()


def execute(run: Run, service: RolloutService) -> None:
    """K traces a question from q or the policy, then n answers a trace from the policy."""
    config = run.config

    def load() -> Loaded:
        return Loaded(round_questions(run), templates(run), question_tokens(run))

    sampling = Sampling(config.sample, config.seed, run.round_index, load)
    sampler, folder = Sampler(config.sample.sampler), run.round / "traces"
    sample_traces(service, sampler_folder(run), sampler, config.sample.num_traces, sampling, folder)
    on_rank_zero(lambda: _warn_of_open_traces(folder))
    answers = run.round / "answers"
    sample_answers(service, run.reference, folder / "data.parquet", config.sample.num_answers, sampling, answers)


def _warn_of_open_traces(folder: Path) -> None:
    finishes = Counter(output(folder, Trace, "finish").table()["finish"].to_pylist())
    if finishes[TraceFinish.CLOSED] < finishes.total() / 2:
        logger.warning(
            "sample: only %d of %d traces are closed; the others get no answers and no weight "
            "(docs/troubleshooting.md#no-closed-traces).",
            finishes[TraceFinish.CLOSED],
            finishes.total(),
        )


def sample_policy(
    service: RolloutService, model: Path, num_traces: int, num_answers: int, sampling: Sampling, folder: Path
) -> None:
    """Traces of a policy and its answers after them, into `folder`/traces and `folder`/answers; every rank calls it."""
    traces = folder / "traces"
    sample_traces(service, model, Sampler.POLICY, num_traces, sampling, traces)
    sample_answers(service, model, traces / "data.parquet", num_answers, sampling, folder / "answers")


def sample_traces(
    service: RolloutService, model: Path, sampler: Sampler, num_traces: int, sampling: Sampling, folder: Path
) -> None:
    """Sample `num_traces` traces a question into `folder`; those of an earlier, interrupted call are kept.

    Every rank calls it. Each node samples the questions that it claims, and rank 0 merges.

    Args:
        model: to sample from.
        sampler: which prompt it is shown, and what is recorded.
    """
    config = sampling.config

    def work(parts: _Parts[Trace]) -> Work:
        questions, templates, texts = sampling.loaded
        prompt_of = texts.posterior_prompt if sampler == Sampler.POSTERIOR else texts.policy_prompt
        close = templates.close_token

        def missing(question: Question) -> list[int]:
            return [index for index in range(num_traces) if (question.id, index) not in parts.have]

        def requests() -> Iterator[tuple[Question, GenerateRequest]]:
            for index, question in claimed_of(enumerate(questions), folder):
                if numbers := missing(question):
                    yield (
                        question,
                        GenerateRequest(
                            prompt_of(question),
                            max_tokens=config.max_trace_tokens,
                            temperature=config.temperature,
                            top_p=config.top_p,
                            seed=derive_seed(sampling.seed, sampler, sampling.round_index, question.id, numbers[0]),
                            stop_token_ids=() if close is None else (close,),
                            stop=(templates.config.close_marker,) if close is None else (),
                            num_samples=len(numbers),
                            return_logps=config.keep_logps == "all" or index < QUESTIONS_WITH_LOGPS,
                        ),
                    )

        def keep(question: Question, generations: list[Generation]) -> None:
            prompt_ids = prompt_of(question)
            parts.writer.append(
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
                    for index, generation in zip(missing(question), generations, strict=True)
                )
            )

        return requests(), keep, sum(bool(missing(question)) for question in questions)

    def expected() -> Iterator[Identity]:
        ids = sorted(question.id for question in sampling.loaded.questions)
        return ((question_id, index, -1) for question_id in ids for index in range(num_traces))

    _sample(service, model, _Parts(folder, Trace, config.flush_seconds), work, f"{sampler} traces", expected)


def sample_answers(
    service: RolloutService, model: Path, traces: Path, num_answers: int, sampling: Sampling, folder: Path
) -> None:
    """Sample `num_answers` answers after each closed trace, from the policy's prompt, into `folder`.

    Questions without a verifier get none: nothing would be learnt from them.

    The prompt is the policy's whoever sampled the trace, and the trace follows it as ids, so that the answers of a
    trace share their prefix on the server. Every rank calls it; see `sample_traces`.

    Args:
        traces: file of `Trace` records.
    """
    config = sampling.config

    def judged() -> dict[str, Question]:
        return {question.id: question for question in sampling.loaded.questions if question.verifier != NO_VERIFIER}

    def answered(of: dict[str, Question], *columns: str) -> Iterator[Trace]:
        """The traces that get answers."""
        for trace in RecordFile(traces, Trace, ("question_id", "trace_index", *columns, "finish")).rows():
            if trace.finish == TraceFinish.CLOSED and trace.question_id in of:
                yield trace

    def work(parts: _Parts[Answer]) -> Work:
        questions, texts = judged(), sampling.loaded.texts

        def missing(key: Key) -> list[int]:
            return [index for index in range(num_answers) if (*key, index) not in parts.have]

        def requests() -> Iterator[tuple[Key, GenerateRequest]]:
            for trace in claimed_of(answered(questions, "sampler", "trace_ids"), folder):
                key = (trace.question_id, trace.trace_index)
                if numbers := missing(key):
                    prompt_ids = texts.policy_prompt(questions[trace.question_id])
                    seed = derive_seed(sampling.seed, "answer", trace.sampler, sampling.round_index, *key, numbers[0])
                    yield (
                        key,
                        GenerateRequest(
                            np.concatenate([prompt_ids, trace.trace_ids]),
                            max_tokens=config.max_answer_tokens,
                            temperature=config.temperature,
                            top_p=config.top_p,
                            seed=seed,
                            num_samples=len(numbers),
                            return_logps=False,
                        ),
                    )

        def keep(key: Key, generations: list[Generation]) -> None:
            parts.writer.append(
                *(
                    Answer(
                        *key, index, sampling.round_index, sample.ids, sample.text, _answer_finish(sample), sample.seed
                    )
                    for index, sample in zip(missing(key), generations, strict=True)
                )
            )

        total = sum(bool(missing((trace.question_id, trace.trace_index))) for trace in answered(questions))
        return requests(), keep, total

    def expected() -> Iterator[Identity]:
        keys = ((trace.question_id, trace.trace_index) for trace in answered(judged()))
        return ((*key, index) for key in keys for index in range(num_answers))

    _sample(service, model, _Parts(folder, Answer, config.flush_seconds), work, "answers", expected)


Work = tuple[Iterator[tuple[Any, GenerateRequest]], Callable[[Any, list[Generation]], None], int]
"""Requests with their keys, what to do with a key's generations, requests of all nodes together."""


class _Parts(Generic[Record]):
    """The part files of a folder, to which this node adds, and what was in them before."""

    def __init__(self, folder: Path, record_type: type[Record], flush_seconds: float) -> None:
        self.folder: Path = folder
        self.record_type: type[Record] = record_type
        self._flush_seconds = flush_seconds

    def open(self) -> None:
        """Look at what there is; no node writes before all have looked."""
        self.writer: RecordWriter[Record] = RecordWriter(self.folder, self.record_type, self._flush_seconds, node())
        self.have: set[tuple[Any, ...]] = self.writer.existing_identities()


def _sample(
    service: RolloutService,
    model: Path,
    parts: _Parts[Any],
    work: Callable[[_Parts[Any]], Work],
    description: str,
    expected: Callable[[], Iterator[Identity]],
) -> None:
    """On every node: what it claims of the requests. On rank 0: set damaged parts aside before, merge and count after.

    What finished is on disk even if some requests fail.
    """

    def ask() -> None:
        requests, keep, total = work(parts)
        tally = Tally(str(parts.folder))

        async def run(engine: Engine) -> None:
            await run_requests(
                engine,
                requests,
                keep,
                description=description,
                total=total,
                show_progress=is_rank_zero(),
                count=tally.add,
            )

        try:
            service.run(model, run)
        finally:
            parts.writer.flush()

    def finish() -> None:
        parts.writer.finish()
        found = RecordFile(parts.writer.file, parts.record_type, identity_columns(parts.record_type))
        check_complete(identities(found), expected(), parts.folder)

    on_rank_zero(lambda: RecordWriter(parts.folder, parts.record_type, 0.0).set_aside_damaged())
    service.on_nodes(parts.open)
    service.on_nodes(ask)
    on_rank_zero(finish)


def claimed_of(items: Iterable[Item], folder: Path) -> Iterator[Item]:
    """The items that fall to this node, some at a time."""
    for block in claimed(_blocks(items), str(folder)):
        yield from block


def _blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while block := list(islice(iterator, BLOCK_REQUESTS)):
        yield block


def derive_seed(*identity: str | int) -> int:
    """A distinct seed for each (run seed, sampler, round, question, trace, answer), in [0, 2^63)."""
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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
