"""Trains the posterior q: on gold traces, on weighted rollouts of the policy, or by reverse KL on its own traces."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megavar.data.tokens import NO_WEIGHT, gold_posterior_sequences, rollout_posterior_sequences
from megavar.joins import by_question
from megavar.record_files import rows
from megavar.records import Trace, TrainSequence, Weight
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.export import export_newest
from megavar.stages.run_files import output, question_tokens, round_questions, train_questions
from megavar.stages.train_job import train_stage
from megavar.stages.weigh import scored_traces, weigh_traces


def execute(run: Run, service: RolloutService) -> None:
    """Train this round's q and export it."""
    init = run.previous.posterior / "hf" if run.learns_by_reverse_kl else run.base
    train_stage(run, "posterior", init, lambda: _sequences(run), run.config.posterior.train, run.posterior)
    export_newest(run.posterior, run.posterior / "hf")


def _sequences(run: Run) -> Iterator[list[TrainSequence]]:
    if run.config.posterior.source == "rollout":
        return _weighted(run, run.round / "rollouts" / "traces", run.round / "rollouts" / "weights")
    if run.learns_by_reverse_kl:
        previous, weights = run.previous, run.round / "reverse_kl"
        all_traces = replace(run.config.objective, max_leakage=None)  # q has to learn which of them to avoid
        weigh_traces(scored_traces(previous), "reverse_kl", all_traces, weights)
        return _weighted(previous, previous.round / "traces", weights)
    tokens, limit = question_tokens(run), run.config.data.max_sequence_tokens
    return iter([gold_posterior_sequences(train_questions(run), tokens, limit)])


def _weighted(run: Run, traces: Path, weights: Path) -> Iterator[list[TrainSequence]]:
    question_of, tokens = {question.id: question for question in round_questions(run)}, question_tokens(run)
    files = output(weights, Weight), output(traces, Trace, "question_id", "trace_index", "round", "trace_ids")
    nothing_has_weight = True
    for some_weights, some_traces in by_question(*files):
        given = [weight for weight in rows(some_weights, Weight) if weight.weight != 0]
        if given:
            nothing_has_weight = False
            chosen = dict.fromkeys(weight.question_id for weight in given)
            questions = [question_of[question_id] for question_id in chosen if question_id in question_of]
            yield rollout_posterior_sequences(questions, rows(some_traces, Trace), given, tokens)
    if nothing_has_weight:
        raise ValueError(NO_WEIGHT)
