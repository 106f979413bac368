"""The round's weighted traces with their questions and answers, some questions at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from megavar.data.question_tokens import QuestionTexts
from megavar.data.tokens import NO_WEIGHT, policy_sequences
from megavar.joins import by_question
from megavar.objectives.importance import select
from megavar.record_files import rows
from megavar.records import Answer, Question, Trace, TrainSequence, Weight
from megavar.runs.folder import Run
from megavar.stages.run_files import output, round_questions


@dataclass(frozen=True)
class WeightedTraces:
    """Of some questions: the traces, their correct answers, and the weights that `objective.selection` leaves."""

    questions: Sequence[Question]
    traces: Sequence[Trace]
    answers: Sequence[Answer]
    weights: Sequence[Weight]

    def sequences(self, texts: QuestionTexts, train_answers: str) -> list[TrainSequence]:
        """See `policy_sequences`."""
        return policy_sequences(self.questions, self.traces, self.answers, self.weights, texts, train_answers)


def weighted_traces(run: Run) -> Iterator[WeightedTraces]:
    """Join the round's weights, traces and answers; prints how many traces were selected.

    Raises:
        ValueError: if records do not join, or no trace has weight.
    """
    objective, seed = run.config.objective, run.config.seed
    question_of = {question.id: question for question in round_questions(run)}
    files = (
        output(run.round / "weights", Weight),
        output(run.round / "traces", Trace, "question_id", "trace_index", "round", "trace_ids"),
        output(
            run.round / "verified", Answer,
            "question_id", "trace_index", "answer_index", "round", "answer_ids", "finish", "correct",
        ),
    )  # fmt: skip
    num_traces, num_questions, pruned_mass = 0, 0, 0.0
    for weights, traces, answers in by_question(*files):
        given = rows(weights, Weight)
        kept, pruned = select(given, objective.selection, objective.min_weight, seed)
        having = len({weight.question_id for weight in given if weight.weight > 0})
        num_traces += len(kept)
        num_questions += having
        pruned_mass += pruned * having
        if kept:
            chosen = dict.fromkeys(weight.question_id for weight in kept)
            questions = [question_of[question_id] for question_id in chosen if question_id in question_of]
            # Wrong answers are not trained on; ones without a verdict stay, to be refused by name.
            learnt = answers.filter(pc.fill_null(answers["correct"], True))
            yield WeightedTraces(questions, rows(traces, Trace), rows(learnt, Answer), kept)
    pruned = pruned_mass / max(num_questions, 1)
    print(f"policy: {num_traces} weighted traces, pruned weight mass (min_weight) {pruned:.4f}", flush=True)
    if num_traces == 0:
        raise ValueError(NO_WEIGHT)
