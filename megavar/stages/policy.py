"""Trains the round's policy on the weighted traces and, by configuration, the gold data."""

from collections.abc import Iterator

from megavar.data.tokens import gold_sequences
from megavar.records import TrainSequence
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import question_tokens, round_questions
from megavar.stages.train_job import train_stage
from megavar.stages.weighted import weighted_traces


def execute(run: Run, service: RolloutService) -> None:
    """Train from the base model, or from the policy that the round starts with."""
    init = run.base if run.config.policy.init == "base" else run.reference
    train_stage(run, "policy", init, lambda: _sequences(run), run.config.policy.train, run.policy)


def _sequences(run: Run) -> Iterator[list[TrainSequence]]:
    tokens = question_tokens(run)
    for some in weighted_traces(run):
        yield some.sequences(tokens, run.config.objective.train_answers)
    if run.config.policy.mix_gold:
        yield gold_sequences(round_questions(run), tokens, run.config.data.max_sequence_tokens)
