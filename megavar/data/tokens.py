"""Training sequences from questions, traces, answers and weights, joined by identity.

A row that is missing or doubled is an error that names it: nothing is joined by position.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from megavar.data.templates import Templates
from megavar.records import Answer, Question, Score, Trace, TrainSequence, Weight

Key = tuple[str, int]
Row = TypeVar("Row", Trace, Score, Weight)


def by_trace(rows: Iterable[Row]) -> dict[Key, Row]:
    """Rows by (question id, trace index).

    Raises:
        ValueError: naming an identity that occurs twice.
    """
    found: dict[Key, Row] = {}
    for row in rows:
        key = (row.question_id, row.trace_index)
        if key in found:
            raise ValueError(
                f"trace {key[1]} of question {key[0]!r} occurs twice; remove the stage's folder, rerun it."
            )
        found[key] = row
    return found


def answers_by_trace(answers: Iterable[Answer]) -> dict[Key, list[Answer]]:
    """Answers of each trace, in the order of their indices."""
    found: dict[Key, list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda row: row.answer_index):
        found[answer.question_id, answer.trace_index].append(answer)
    return found


def gold_sequences(questions: Sequence[Question], templates: Templates, longest: int) -> list[TrainSequence]:
    """Policy sequences of the gold data, weight 1 each: prompt -> trace, answer. Questions without trace are left out.

    Raises:
        ValueError: naming a question whose sequence is longer than `longest` tokens, or if no question has a trace.
    """
    sequences = [_gold(question, templates) for question in questions if question.trace is not None]
    kept = [question for question in questions if question.trace is not None]
    if not kept:
        raise ValueError("no question has a gold trace, which this stage trains on; give questions with `trace`.")
    for question, sequence in zip(kept, sequences, strict=True):
        _check_length(question.id, sequence, longest)
    return sequences


def gold_posterior_sequences(questions: Sequence[Question], templates: Templates, longest: int) -> list[TrainSequence]:
    """Posterior sequences of the gold data, weight 1 each: prompt with hint -> trace (equation 9, no answer term)."""
    sequences = []
    for question in questions:
        if question.trace is not None:
            sequence = TrainSequence(templates.posterior_prompt(question), templates.trace(question.trace), 1.0)
            _check_length(question.id, sequence, longest)
            sequences.append(sequence)
    return sequences


def rollout_posterior_sequences(
    questions: Sequence[Question], traces: Iterable[Trace], weights: Iterable[Weight], templates: Templates
) -> list[TrainSequence]:
    """Posterior sequences of weighted policy rollouts: prompt with hint -> trace (equation 9)."""
    question_of, trace_of = {question.id: question for question in questions}, by_trace(traces)
    sequences = []
    for key, weight in by_trace(weights).items():
        if weight.weight > 0:
            prompt = templates.posterior_prompt(question_of[key[0]])
            sequences.append(TrainSequence(prompt, _trace_of(trace_of, key).trace_ids, weight.weight))
    return sequences


def policy_sequences(
    questions: Sequence[Question],
    traces: Iterable[Trace],
    answers: Iterable[Answer],
    weights: Iterable[Weight],
    templates: Templates,
    answers_used: str,
) -> list[TrainSequence]:
    """Policy sequences of weighted traces: prompt -> trace, answer (equation 6 and the answer term).

    Args:
        traces: the sampled traces.
        answers: the verified answers of those traces.
        weights: of those traces; trace index -1 stands for the question's gold trace.
        answers_used: `all_correct`: every distinct correct answer of a trace shares its weight equally;
            `first_correct`: the first one has it all; `reference`: the reference answer has it all.
    """
    question_of, trace_of = {question.id: question for question in questions}, by_trace(traces)
    answers_of = answers_by_trace(answers)
    sequences = []
    for key, weight in by_trace(weights).items():
        if weight.weight <= 0:
            continue
        question = question_of[key[0]]
        if weight.status == "gold":
            sequences.append(_gold(question, templates, weight.weight))
            continue
        trace, prompt = _trace_of(trace_of, key), templates.policy_prompt(question)
        if answers_used == "reference":
            written = [templates.answer(question)]
        else:
            correct = [answer.answer_ids for answer in answers_of[key] if answer.correct]
            distinct = list({ids.tobytes(): ids for ids in correct}.values())
            written = distinct[:1] if answers_used == "first_correct" else distinct
            if not written:
                raise ValueError(f"trace {key[1]} of question {key[0]!r} has weight but no correct answer.")
        for ids in written:
            target = np.concatenate([trace.trace_ids, ids])
            sequences.append(TrainSequence(prompt, target, weight.weight / len(written)))
    return sequences


def _gold(question: Question, templates: Templates, weight: float = 1.0) -> TrainSequence:
    if question.trace is None:
        raise ValueError(f"question {question.id!r} has no gold trace; use objective.on_no_correct_trace=drop.")
    target = np.concatenate([templates.trace(question.trace), templates.answer(question)])
    return TrainSequence(templates.policy_prompt(question), target, weight)


def _trace_of(traces: dict[Key, Trace], key: Key) -> Trace:
    if key not in traces:
        raise ValueError(f"trace {key[1]} of question {key[0]!r} has a weight but is not among the sampled traces.")
    return traces[key]


def _check_length(question_id: str, sequence: TrainSequence, longest: int) -> None:
    if sequence.num_tokens > longest:
        raise ValueError(
            f"question {question_id!r} makes a gold sequence of {sequence.num_tokens} tokens, over "
            f"data.max_sequence_tokens={longest}; raise that or remove the question."
        )
