"""Trains pi_0 from the base model on the gold traces."""

from megavar.data.tokens import gold_sequences
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.export import export_newest
from megavar.stages.run_files import question_tokens, train_questions
from megavar.stages.train_job import train_stage


def execute(run: Run, service: RolloutService) -> None:
    """Train pi_0 and export it."""
    limit = run.config.data.max_sequence_tokens
    train_stage(
        run,
        "sft",
        run.base,
        lambda: [gold_sequences(train_questions(run), question_tokens(run), limit)],
        run.config.sft,
        run.sft,
    )
    export_newest(run.sft, run.sft / "hf")
