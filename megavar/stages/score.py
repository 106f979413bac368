"""Scores every trace under the policy and the posterior, by the training engine's forward on all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megavar.config.schema import ParallelConfig, PrecisionConfig, ScoreConfig
from megavar.data.templates import Templates
from megavar.data.tokens import answers_by_trace, by_trace, count_correct
from megavar.models.convert import Model
from megavar.progress import ProgressLine
from megavar.records import Answer, LogProbs, Question, RecordWriter, Score, Trace, TrainSequence
from megavar.training.parallel import barrier, is_rank_zero
from megavar.training.score import Scorer


def score_traces(
    questions: Sequence[Question],
    traces: Sequence[Trace],
    answers: Sequence[Answer],
    policy: Path,
    posterior: Path,
    config: ScoreConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    templates: Templates,
    folder: Path,
) -> None:
    """Write a `Score` for every trace to `folder`; every rank calls it with the same records.

    log pi(z|x) and log pi(y'|x, z) of the reference answer come from one forward of the policy, log q(z|x, y') from
    one of the posterior, under the prompt it was sampled with; where the policy itself drew the traces they are the
    same, and one forward gives both. Truncated traces get empty log-probs. Finished chunks of an interrupted call are
    kept.

    Args:
        posterior: who drew the traces; it may be `policy`.

    Raises:
        ValueError: if kept rows are not of these traces.
    """
    question_of = {question.id: question for question in questions}
    closed = [trace for trace in traces if trace.finish == "closed"]
    counts = {key: (len(group), count_correct(group)) for key, group in answers_by_trace(answers).items()}

    def under_policy(trace: Trace) -> TrainSequence:
        question = question_of[trace.question_id]
        target = np.concatenate([trace.trace_ids, templates.answer(question)])
        return TrainSequence(templates.policy_prompt(question), target, 1.0)

    def policy_score(trace: Trace, logps: LogProbs) -> Score:
        key, length = (trace.question_id, trace.trace_index), len(trace.trace_ids)
        num_answers, num_correct = counts.get(key, (None, None))
        return Score(*key, trace.round, logps[:length], None, logps[length:], num_answers, num_correct)

    half_done = RecordWriter(folder / "policy", Score, flush_seconds=0.0)
    _score_all(policy, closed, under_policy, policy_score, half_done, config, parallel, precision)

    first = by_trace(half_done.existing())
    writer = RecordWriter(folder, Score, flush_seconds=0.0)
    if posterior != policy:
        _score_all(
            posterior,
            closed,
            lambda trace: TrainSequence(trace.prompt_ids, trace.trace_ids, 1.0),
            lambda trace, logps: replace(first[trace.question_id, trace.trace_index], logp_posterior=logps),
            writer,
            config,
            parallel,
            precision,
        )
    elif is_rank_zero():
        have = by_trace(writer.existing())
        writer.append(*(replace(row, logp_posterior=row.logp_policy) for key, row in first.items() if key not in have))
    if is_rank_zero():
        nothing = np.zeros(0, np.float32)
        for trace in traces:
            if trace.finish != "closed":
                key = (trace.question_id, trace.trace_index)
                writer.append(Score(*key, trace.round, nothing, nothing, nothing, None, None))
        writer.finish()


def _score_all(
    model: Path,
    traces: Sequence[Trace],
    sequence_of: Callable[[Trace], TrainSequence],
    record_of: Callable[[Trace, LogProbs], Score],
    writer: RecordWriter,
    config: ScoreConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> None:
    have = by_trace(writer.existing())
    for trace in traces:
        row = have.get((trace.question_id, trace.trace_index))
        if row is not None and (row.round, len(row.logp_policy)) != (trace.round, len(trace.trace_ids)):
            raise ValueError(
                f"a kept score of trace {trace.trace_index} of question {trace.question_id!r} is of another trace; "
                "remove the stage's folder and run `megavar score` again."
            )
    pending = [trace for trace in traces if (trace.question_id, trace.trace_index) not in have]
    barrier()  # every rank has read what is there before rank 0 adds to it
    if not pending:
        return
    scorer = Scorer(Model(model), parallel, precision)
    with ProgressLine(f"scores under {model}", show=is_rank_zero()) as progress:
        num_tokens = 0
        for start in range(0, len(pending), config.chunk_sequences):
            chunk = pending[start : start + config.chunk_sequences]
            sequences = [sequence_of(trace) for trace in chunk]
            found = scorer.score(sequences, config.temperature, config.microbatch_tokens)
            if found is not None:
                writer.append(*(record_of(trace, logps) for trace, logps in zip(chunk, found, strict=True)))
            num_tokens += sum(sequence.num_tokens for sequence in sequences)
            rate = num_tokens / progress.seconds
            progress.update(start + len(chunk), len(pending), f"traces, {rate:,.0f} tokens/s")
    scorer.release()
    barrier()
