"""Trains the round's policy on the weighted traces and, by configuration, the gold data."""

from megavar.data.tokens import gold_sequences, policy_sequences
from megavar.objectives.importance import select
from megavar.records import Answer, Trace, TrainSequence, Weight
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import read_output, round_questions, templates
from megavar.stages.train_job import train_stage


def execute(run: Run, service: RolloutService) -> None:
    """Train from the base model, or from the policy that the round starts with."""
    init = run.base if run.config.policy.init == "base" else run.reference
    train_stage(run, "policy", init, lambda: _sequences(run), run.config.policy.train, run.policy)


def _sequences(run: Run) -> list[TrainSequence]:
    config, objective = run.config, run.config.objective
    all_weights = read_output(run.round / "weights", Weight)
    weights, pruned = select(all_weights, objective.selection, objective.min_weight, config.seed)
    print(f"policy: {len(weights)} weighted traces, pruned weight mass (min_weight) {pruned:.4f}", flush=True)
    traces, answers = read_output(run.round / "traces", Trace), read_output(run.round / "verified", Answer)
    questions, prompts = round_questions(run), templates(run)
    sequences = policy_sequences(questions, traces, answers, weights, prompts, objective.train_answers)
    if config.policy.mix_gold:
        sequences += gold_sequences(questions, prompts, config.data.max_sequence_tokens)
    return sequences
