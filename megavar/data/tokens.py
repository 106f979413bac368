"""Builds training sequences from questions, traces, answers and weights.

Records are joined by (question id, trace index), never by position; a missing or duplicate record is an error
that names it (`joins.py`). Runs on rank 0, on the records of some questions at a time. Sequences share the memory of
the records and of the questions' tokens.
"""

from collections.abc import Iterable, Sequence

from megavar.data.question_tokens import QuestionTexts
from megavar.joins import Key, answers_by_trace, by_trace
from megavar.records import Answer, AnswerFinish, Question, TokenIds, Trace, TrainSequence, Weight, WeightStatus

NO_WEIGHT = (
    "no trace has weight: no closed trace has a correct answer; sample more, or train longer "
    "(docs/troubleshooting.md#no-trace-has-weight)."
)


def gold_sequences(questions: Sequence[Question], texts: QuestionTexts, max_tokens: int) -> list[TrainSequence]:
    """Policy sequences of the gold data, weight 1 each: prompt -> trace, answer. Skips questions without a trace.

    Args:
        max_tokens: maximum length of prompt and target together.

    Raises:
        ValueError: naming a question whose sequence is longer than `max_tokens`, or if no question has a trace.
    """
    return [_limited(question, _gold(question, texts), max_tokens) for question in _with_trace(questions)]


def gold_posterior_sequences(
    questions: Sequence[Question], texts: QuestionTexts, max_tokens: int
) -> list[TrainSequence]:
    """Posterior sequences of the gold data, weight 1 each: prompt with hint -> trace (equation 9, no answer term).

    Raises:
        ValueError: see `gold_sequences`.
    """
    return [
        _limited(question, TrainSequence(texts.posterior_prompt(question), texts.trace(question), 1.0), max_tokens)
        for question in _with_trace(questions)
    ]


def rollout_posterior_sequences(
    questions: Sequence[Question], traces: Iterable[Trace], weights: Iterable[Weight], texts: QuestionTexts
) -> list[TrainSequence]:
    """Posterior sequences of weighted policy rollouts: prompt with hint -> trace (equation 9).

    Skips traces of weight 0.

    Raises:
        ValueError: naming a missing or duplicate record, or if all weights are 0.
    """
    question_of, trace_of = {question.id: question for question in questions}, by_trace(traces)
    return [
        TrainSequence(
            texts.posterior_prompt(_question_of(question_of, weight)),
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
    texts: QuestionTexts,
    train_answers: str,
) -> list[TrainSequence]:
    """Policy sequences of weighted traces: prompt -> trace, answer (docs/method.md, equation 6 and the answer term).

    Skips traces of weight 0. Traces with the status `no_correct_trace` or `unverifiable` train on the
    reference answer.

    Args:
        traces: the sampled traces.
        answers: the verified answers of these traces.
        weights: of these traces; trace index -1 is the question's gold trace with its reference answer.
        train_answers: `all_correct`: one sequence per distinct correct answer; they share the trace's weight equally.
            `first_correct`: the first correct answer. `reference`: the reference answer. A correct answer truncated by
            the length limit is used only if the trace has no complete one, since it does not teach the model to stop.

    Raises:
        ValueError: naming a missing, duplicate or unverified record, or if all weights are 0.
    """
    question_of, trace_of = {question.id: question for question in questions}, by_trace(traces)
    answers_of = answers_by_trace(answers)
    prompt_of: dict[str, TokenIds] = {}
    sequences = []
    for weight in _with_weight(weights):
        question = _question_of(question_of, weight)
        if weight.status == WeightStatus.GOLD:
            sequences.append(_gold(question, texts, weight.weight))
            continue
        trace = _trace_of(trace_of, weight)
        if question.id not in prompt_of:
            prompt_of[question.id] = texts.policy_prompt(question)
        by_reference = weight.status in (WeightStatus.NO_CORRECT_TRACE, WeightStatus.UNVERIFIABLE)
        if train_answers == "reference" or by_reference:
            answer_ids = [texts.answer(question)]
        else:
            distinct = _distinct_correct(answers_of[weight.question_id, weight.trace_index], weight)
            answer_ids = distinct[:1] if train_answers == "first_correct" else distinct
        share = weight.weight / len(answer_ids)
        prompt = prompt_of[question.id]
        sequences += [TrainSequence(prompt, trace.trace_ids, share, ids) for ids in answer_ids]
    return sequences


def _gold(question: Question, texts: QuestionTexts, weight: float = 1.0) -> TrainSequence:
    return TrainSequence(texts.policy_prompt(question), texts.trace(question), weight, texts.answer(question))


def _with_trace(questions: Sequence[Question]) -> list[Question]:
    kept = [question for question in questions if question.trace is not None]
    if not kept:
        raise ValueError("no question has a gold trace, which this stage trains on; add `trace` to the question file.")
    return kept


def _with_weight(weights: Iterable[Weight]) -> list[Weight]:
    kept = [weight for weight in by_trace(weights).values() if float(weight.weight) != 0]
    if not kept:
        raise ValueError(NO_WEIGHT)
    return kept


def _question_of(questions: dict[str, Question], weight: Weight) -> Question:
    if weight.question_id not in questions:
        raise ValueError(f"{_describe(weight)} has a weight, but its question is not in the question file.")
    return questions[weight.question_id]


def _trace_of(traces: dict[Key, Trace], weight: Weight) -> Trace:
    trace = traces.get((weight.question_id, weight.trace_index))
    if trace is None or trace.round != weight.round:
        raise ValueError(
            f"{_describe(weight)} has a weight, but is not among the sampled traces of round {weight.round}; rerun "
            "`megavar weigh`."
        )
    return trace


def _distinct_correct(answers: Sequence[Answer], weight: Weight) -> list[TokenIds]:
    for answer in answers:
        if answer.correct is None or answer.round != weight.round:
            raise ValueError(
                f"{_describe(weight)}: answer {answer.answer_index} has correct={answer.correct}, "
                f"round={answer.round}; expected a verified answer of round {weight.round}; run `megavar verify`."
            )
    correct = [answer for answer in answers if answer.correct]
    if not correct:
        raise ValueError(
            f"{_describe(weight)} has weight but no correct answer; use objective.train_answers=reference."
        )
    complete = [answer for answer in correct if answer.finish == AnswerFinish.STOP] or correct
    return list({answer.answer_ids.tobytes(): answer.answer_ids for answer in complete}.values())


def _describe(weight: Weight) -> str:
    return f"trace {weight.trace_index} of question {weight.question_id!r}"


def _limited(question: Question, sequence: TrainSequence, max_tokens: int) -> TrainSequence:
    if sequence.num_tokens > max_tokens:
        raise ValueError(
            f"question {question.id!r} has a gold sequence of {sequence.num_tokens} tokens, more than "
            f"data.max_sequence_tokens={max_tokens}; raise the limit or remove the question."
        )
    return sequence
