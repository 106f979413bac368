"""Trains the posterior q: on gold traces, on weighted rollouts of the policy, or by reverse KL on its own traces."""

from pathlib import Path

from megavar.data.tokens import gold_posterior_sequences, rollout_posterior_sequences
from megavar.records import Score, Trace, TrainSequence, Weight
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.export import export_newest
from megavar.stages.run_files import read_output, round_questions, templates, train_questions
from megavar.stages.train_job import train_stage
from megavar.stages.weigh import weigh_traces


def execute(run: Run, service: RolloutService) -> None:
    """Train this round's q and export it."""
    init = run.previous.posterior / "hf" if run.learns_by_reverse_kl else run.base
    train_stage(run, "posterior", init, lambda: _sequences(run), run.config.posterior.train, run.posterior)
    export_newest(run.posterior, run.posterior / "hf")


def _sequences(run: Run) -> list[TrainSequence]:
    if run.config.posterior.source == "rollout":
        return _weighted(run, run.round / "rollouts" / "traces", run.round / "rollouts" / "weights")
    if run.learns_by_reverse_kl:
        previous, weights = run.previous.round, run.round / "reverse_kl"
        traces, scores = read_output(previous / "traces", Trace), read_output(previous / "scores", Score)
        weigh_traces(traces, scores, "reverse_kl", run.config.objective, weights)
        return _weighted(run.previous, previous / "traces", weights)
    return gold_posterior_sequences(train_questions(run), templates(run), run.config.data.max_sequence_tokens)


def _weighted(run: Run, traces: Path, weights: Path) -> list[TrainSequence]:
    return rollout_posterior_sequences(
        round_questions(run), read_output(traces, Trace), read_output(weights, Weight), templates(run)
    )
