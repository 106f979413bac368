"""Training sequences from questions, traces, answers and weights, joined by identity.

A row that is missing or doubled is an error that names it: nothing is joined by position (`joins.py`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from megavar.data.templates import Templates
from megavar.joins import Key, answers_by_trace, by_trace
from megavar.records import Answer, AnswerFinish, Question, TokenIds, Trace, TrainSequence, Weight, WeightStatus


def gold_sequences(questions: Sequence[Question], templates: Templates, longest: int) -> list[TrainSequence]:
    """Policy sequences of the gold data, weight 1 each: prompt -> trace, answer. Questions without trace are left out.

    Raises:
        ValueError: naming a question whose sequence is longer than `longest` tokens, or if no question has a trace.
    """
    return [_checked(question, _gold(question, templates), longest) for question in _with_trace(questions)]


def gold_posterior_sequences(questions: Sequence[Question], templates: Templates, longest: int) -> list[TrainSequence]:
    """Posterior sequences of the gold data, weight 1 each: prompt with hint -> trace (equation 9, no answer term).

    Raises:
        ValueError: as `gold_sequences`.
    """
    return [
        _checked(question, TrainSequence(templates.posterior_prompt(question), templates.trace(question), 1.0), longest)
        for question in _with_trace(questions)
    ]


def rollout_posterior_sequences(
    questions: Sequence[Question], traces: Iterable[Trace], weights: Iterable[Weight], templates: Templates
) -> list[TrainSequence]:
    """Posterior sequences of weighted policy rollouts: prompt with hint -> trace (equation 9).

    Raises:
        ValueError: naming a row that is missing or doubled, or if no rollout has weight.
    """
    question_of, trace_of = {question.id: question for question in questions}, by_trace(traces)
    return [
        TrainSequence(
            templates.posterior_prompt(_question_of(question_of, weight)),
            _trace_of(trace_of, weight).trace_ids,
            weight.weight,
        )
        for weight in _with_weight(weights)
    ]


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
            `first_correct`: the first one has it all; `reference`: the reference answer has it all, as it has
            whatever is used here for a trace with weight and the status `no_correct_trace`. A correct answer that
            was cut by the length limit is used only after a trace that has no complete one: it teaches no end.

    Raises:
        ValueError: naming a row that is missing, doubled or not verified, or if no trace has weight.
    """
    question_of, trace_of = {question.id: question for question in questions}, by_trace(traces)
    answers_of = answers_by_trace(answers)
    sequences = []
    for weight in _with_weight(weights):
        question = _question_of(question_of, weight)
        if weight.status == WeightStatus.GOLD:
            sequences.append(_gold(question, templates, weight.weight))
            continue
        trace, prompt = _trace_of(trace_of, weight), templates.policy_prompt(question)
        if answers_used == "reference" or weight.status == WeightStatus.NO_CORRECT_TRACE:
            written = [templates.answer(question)]
        else:
            distinct = _distinct_correct(answers_of[weight.question_id, weight.trace_index], weight)
            written = distinct[:1] if answers_used == "first_correct" else distinct
        for ids in written:
            target = np.concatenate([trace.trace_ids, ids])
            sequences.append(TrainSequence(prompt, target, weight.weight / len(written)))
    return sequences


def _gold(question: Question, templates: Templates, weight: float = 1.0) -> TrainSequence:
    target = np.concatenate([templates.trace(question), templates.answer(question)])
    return TrainSequence(templates.policy_prompt(question), target, weight)


def _with_trace(questions: Sequence[Question]) -> list[Question]:
    kept = [question for question in questions if question.trace is not None]
    if not kept:
        raise ValueError("no question has a gold trace, which this stage trains on; give questions with `trace`.")
    return kept


def _with_weight(weights: Iterable[Weight]) -> list[Weight]:
    kept = [weight for weight in by_trace(weights).values() if float(weight.weight) != 0]
    if not kept:
        raise ValueError("no trace has weight: none was closed and had a correct answer; sample more, or train longer.")
    return kept


def _question_of(questions: dict[str, Question], weight: Weight) -> Question:
    if weight.question_id not in questions:
        raise ValueError(f"{_name(weight)} has a weight but its question is not in the question file.")
    return questions[weight.question_id]


def _trace_of(traces: dict[Key, Trace], weight: Weight) -> Trace:
    trace = traces.get((weight.question_id, weight.trace_index))
    if trace is None or trace.round != weight.round:
        raise ValueError(f"{_name(weight)} has a weight but is not among the sampled traces of round {weight.round}.")
    return trace


def _distinct_correct(answers: Sequence[Answer], weight: Weight) -> list[TokenIds]:
    for answer in answers:
        if answer.correct is None or answer.round != weight.round:
            raise ValueError(
                f"{_name(weight)}: answer {answer.answer_index} has correct={answer.correct}, round={answer.round}; "
                f"expected a verified one of round {weight.round}; run `megavar verify`."
            )
    correct = [answer for answer in answers if answer.correct]
    if not correct:
        raise ValueError(f"{_name(weight)} has weight but no correct answer; use objective.train_answers=reference.")
    complete = [answer for answer in correct if answer.finish == AnswerFinish.STOP] or correct
    return list({answer.answer_ids.tobytes(): answer.answer_ids for answer in complete}.values())


def _name(weight: Weight) -> str:
    return f"trace {weight.trace_index} of question {weight.question_id!r}"


def _checked(question: Question, sequence: TrainSequence, longest: int) -> TrainSequence:
    if sequence.num_tokens > longest:
        raise ValueError(
            f"question {question.id!r} makes a gold sequence of {sequence.num_tokens} tokens, over "
            f"data.max_sequence_tokens={longest}; raise that or remove the question."
        )
    return sequence
