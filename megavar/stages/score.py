"""Scores every trace under the policy and the posterior, by the training engine's forward on all ranks."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, ScoreConfig
from megavar.data.templates import Templates
from megavar.joins import OUTPUTS_DO_NOT_MATCH, answers_by_trace, by_trace, check_complete, count_correct
from megavar.progress import ProgressLine
from megavar.ranks import barrier, from_rank_zero, is_rank_zero
from megavar.records import Answer, LogProbs, Question, RecordWriter, Score, Trace, TraceFinish, TrainSequence, identity
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import read_output, round_questions, sampler_folder, templates
from megavar.stopping import Stopped
from megavar.training.parallel import agree
from megavar.training.scorer import Scorer
from megavar.verifiers import NO_VERIFIER


@dataclass(frozen=True)
class Scoring:
    """How sequences are scored, whatever the model."""

    config: ScoreConfig
    parallel: ParallelConfig
    precision: PrecisionConfig


@dataclass(frozen=True)
class TraceSet:
    """What is scored; rank 0 reads it, and the other ranks only run the models."""

    questions: Sequence[Question]
    traces: Sequence[Trace]
    answers: Sequence[Answer]
    """Verified ones of those traces."""
    templates: Templates

    @property
    def closed(self) -> list[Trace]:
        """Truncated traces are not scored."""
        return [trace for trace in self.traces if trace.finish == TraceFinish.CLOSED]


def execute(run: Run, service: RolloutService) -> None:
    """Log-probs of every trace under the policy that the round starts with, and under the model it was sampled from."""
    config = run.config
    trace_set = None
    if is_rank_zero():
        traces, answers = read_output(run.round / "traces", Trace), read_output(run.round / "verified", Answer)
        trace_set = TraceSet(round_questions(run), traces, answers, templates(run))
    scoring = Scoring(config.score, config.parallel, config.precision)
    score_traces(trace_set, run.reference, sampler_folder(run), scoring, run.round / "scores")


def score_traces(trace_set: TraceSet | None, policy: Path, sampler: Path, scoring: Scoring, folder: Path) -> None:
    """Write a `Score` for every trace to `folder`; every rank calls it, with the traces on rank 0 and None elsewhere.

    log pi(z|x) and log pi(y'|x, z) of the reference answer come from one forward of the policy, log q(z|x, y') from
    one of the posterior, under the prompt it was sampled with. Where the policy itself sampled the traces the two are
    equal, and one forward gives both. Truncated traces get empty log-probs. Finished chunks of an interrupted call are
    kept. The folder `policy` in it holds the rows of the first pass until all are complete.

    Args:
        sampler: the model that the traces were sampled from, a Hugging Face folder; may equal `policy`.

    Raises:
        ValueError: if existing rows are not of these traces.
    """
    first = RecordWriter(folder / "policy", Score, flush_seconds=0.0)
    last = RecordWriter(folder, Score, flush_seconds=0.0)
    pending = None if trace_set is None else replace(trace_set, traces=_without_existing(trace_set.traces, last))
    _score_all(policy, first, scoring, None if pending is None else _under_policy(pending))
    if sampler != policy:
        _score_all(sampler, last, scoring, None if pending is None else _under_posterior(pending, first))
    if trace_set is None or pending is None:
        return
    if sampler == policy:
        rows = by_trace(first.existing())
        same = (rows[trace.question_id, trace.trace_index] for trace in pending.closed)
        last.append(*(replace(row, logp_posterior=row.logp_policy) for row in same))
    nothing = np.zeros(0, np.float32)
    for trace in pending.traces:
        if trace.finish != TraceFinish.CLOSED:
            key = (trace.question_id, trace.trace_index)
            last.append(Score(*key, trace.round, nothing, nothing, nothing, None, None))
    check_complete(last.finish(), map(identity, trace_set.traces), folder)
    shutil.rmtree(first.folder)


@dataclass(frozen=True)
class _Pass:
    """The traces to score under one model: their sequences, and their records once scored."""

    traces: list[Trace]
    sequence_of: Callable[[Trace], TrainSequence]
    record_of: Callable[[Trace, LogProbs], Score]


def _under_policy(trace_set: TraceSet) -> _Pass:
    question_of = {question.id: question for question in trace_set.questions}
    counts = {key: (len(group), count_correct(group)) for key, group in answers_by_trace(trace_set.answers).items()}

    def sequence(trace: Trace) -> TrainSequence:
        question = question_of[trace.question_id]
        target = np.concatenate([trace.trace_ids, trace_set.templates.answer(question)])
        return TrainSequence(trace_set.templates.policy_prompt(question), target, 1.0)

    def record(trace: Trace, logps: LogProbs) -> Score:
        key, length = (trace.question_id, trace.trace_index), len(trace.trace_ids)
        unjudged = (0, 0) if question_of[trace.question_id].verifier == NO_VERIFIER else (None, None)
        num_answers, num_correct = counts.get(key, unjudged)
        return Score(*key, trace.round, logps[:length], None, logps[length:], num_answers, num_correct)

    return _Pass(trace_set.closed, sequence, record)


def _under_posterior(trace_set: TraceSet, under_policy: RecordWriter) -> _Pass:
    rows = by_trace(under_policy.existing())
    return _Pass(
        trace_set.closed,
        lambda trace: TrainSequence(trace.prompt_ids, trace.trace_ids, 1.0),
        lambda trace, logps: replace(rows[trace.question_id, trace.trace_index], logp_posterior=logps),
    )


def _score_all(model: Path, writer: RecordWriter, scoring: Scoring, scored: _Pass | None) -> None:
    pending: list[Trace] = []

    def sequences_to_score() -> list[TrainSequence]:
        assert scored is not None
        pending.extend(_without_existing(scored.traces, writer))
        return [scored.sequence_of(trace) for trace in pending]

    sequences = from_rank_zero(sequences_to_score)
    if not sequences:
        return
    scorer = Scorer(Model(model), scoring.parallel, scoring.precision)
    config = scoring.config
    with ProgressLine(f"scores under {model}", show=is_rank_zero()) as progress:
        num_tokens = 0
        for start in range(0, len(sequences), config.chunk_sequences):
            if agree()[0]:
                raise Stopped(f"{start} of {len(sequences)} traces have their scores under {model}")
            chunk = sequences[start : start + config.chunk_sequences]
            logps_of = scorer.score(chunk, config.temperature, config.microbatch_tokens)
            if scored is not None and logps_of is not None:
                traces = pending[start : start + config.chunk_sequences]
                writer.append(*(scored.record_of(*pair) for pair in zip(traces, logps_of, strict=True)))
            num_tokens += sum(sequence.num_tokens for sequence in chunk)
            rate = num_tokens / progress.seconds
            progress.update(start + len(chunk), len(sequences), f"traces, {rate:,.0f} tokens/s")
    scorer.release()
    barrier()


def _without_existing(traces: Sequence[Trace], writer: RecordWriter) -> list[Trace]:
    """Those without a row on disk; a row must be of the trace with its identity."""
    existing = by_trace(writer.existing())
    for trace in traces:
        row = existing.get((trace.question_id, trace.trace_index))
        num_tokens = len(trace.trace_ids) if trace.finish == TraceFinish.CLOSED else 0
        if row is not None and (row.round, len(row.logp_policy)) != (trace.round, num_tokens):
            raise ValueError(
                f"an existing score of trace {trace.trace_index} of question {trace.question_id!r} is of another "
                f"trace; remove {writer.folder} and run `megavar score` again ({OUTPUTS_DO_NOT_MATCH})."
            )
    return [trace for trace in traces if (trace.question_id, trace.trace_index) not in existing]
