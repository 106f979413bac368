"""Turns scores into weights, question by question, and returns statistics of them."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megavar.config.schema import ObjectiveConfig, RunConfig
from megavar.joins import OUTPUTS_DO_NOT_MATCH, answers_by_trace, check_complete, count_correct
from megavar.objectives import get_objective
from megavar.objectives.base import Objective
from megavar.objectives.bounds import estimate_bounds
from megavar.objectives.importance import effective_sample_size, weigh_by_reference
from megavar.ranks import on_rank_zero
from megavar.records import Answer, Bound, Score, Trace, TraceFinish, Weight, WeightStatus, identity, write_records
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import log_values, read_output

logger = logging.getLogger(__name__)

LOW_ESS = 1.2
LARGE_DIFFERENCE_NATS = {"fp32": 0.01, "bf16": 1.0}
"""Of one token: the largest of a whole round is far above the mean, most of all where engines round to bf16."""


def execute(run: Run, service: RolloutService) -> None:
    """The weight of every trace among those of its question."""

    def work() -> None:
        traces, scores = read_output(run.round / "traces", Trace), read_output(run.round / "scores", Score)
        objective = run.config.objective
        values = weigh_traces(traces, scores, objective.name, objective, run.round / "weights")
        if run.config.score.temperature == run.config.sample.temperature:
            values["largest_engine_difference"] = engine_difference(traces, scores)
        _warn(values, run.config)
        log_values(run, "weigh", {run.round_index: values})

    on_rank_zero(work)


def _warn(values: dict[str, float], config: RunConfig) -> None:
    """Say what a run should not go on with unseen."""
    if 0 < values["ess"] < LOW_ESS and config.num_traces > 1:
        logger.warning(
            "weigh: the effective sample size is %.2f of %d traces: one trace a question decides "
            "(docs/troubleshooting.md#ess-near-1).",
            values["ess"],
            config.num_traces,
        )
    difference = values.get("largest_engine_difference", 0.0)
    if difference > LARGE_DIFFERENCE_NATS[config.precision.dtype]:
        logger.warning(
            "weigh: log-probs of serving and training engine differ by up to %.3g nats "
            "(docs/troubleshooting.md#large-engine-difference).",
            difference,
        )


def weigh_traces(
    traces: Sequence[Trace], scores: Sequence[Score], objective: str, config: ObjectiveConfig, folder: Path
) -> dict[str, float]:
    """Write a `Weight` for every trace and a `Bound` for every question to `folder`, and return the totals.

    Raises:
        ValueError: if scores and traces are not of the same traces, or lack what the objective needs.
    """
    finish_of = {(trace.question_id, trace.trace_index): trace.finish for trace in traces}
    of_question: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        of_question[score.question_id].append(score)
    scored = {(score.question_id, score.trace_index) for score in scores}
    if scored != finish_of.keys() or len(scored) != len(scores):
        differing = sorted(scored ^ finish_of.keys())
        raise ValueError(
            f"scores and traces differ in {differing[:3] or 'duplicate rows'}; run `megavar score` again "
            f"({OUTPUTS_DO_NOT_MATCH})."
        )
    chosen = get_objective(objective)
    weights: list[Weight] = []
    sizes: list[float] = []
    groups: list[tuple[list[Score], list[bool], list[Weight]]] = []
    for question_id in sorted(of_question):
        every = sorted(of_question[question_id], key=lambda score: score.trace_index)
        truncated = [finish_of[question_id, score.trace_index] != TraceFinish.CLOSED for score in every]
        group = every[: config.num_traces]
        group_weights = _weigh_question(chosen, group, truncated[: len(group)], config)
        weights += group_weights + [_unused(score) for score in every[len(group) :]]
        groups.append((every, truncated, group_weights))
        if any(weight.weight > 0 for weight in group_weights):
            sizes.append(effective_sample_size(np.array([weight.weight for weight in group_weights])))
    bounds = estimate_bounds(*zip(*groups, strict=True)) if groups else []
    of_traces = [weight for weight in weights if weight.status != WeightStatus.GOLD]
    check_complete(of_traces, map(identity, traces), folder)
    write_records(folder / "data.parquet", weights, Weight)
    if bounds:
        write_records(folder / "bounds.parquet", bounds, Bound)
    statuses = Counter(weight.status for weight in weights)
    return {
        "questions": float(len(of_question)),
        "questions_with_weight": float(len(sizes)),
        "ess": float(np.mean(sizes)) if sizes else 0.0,
        **_mean_bounds(bounds),
        **{f"traces_{status}": float(count) for status, count in sorted(statuses.items())},
    }


def _weigh_question(
    objective: Objective, group: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig
) -> list[Weight]:
    """Weights of one question's traces; one without a verifier is weighed by its reference answer, or not at all."""
    if all(score.num_answers != 0 for score in group):
        return objective.weigh(group, truncated, config)
    weights = (objective.weigh_unverifiable or weigh_by_reference)(group, truncated, config)
    if config.on_unverifiable == "drop":
        weights = [replace(row, weight=0.0) for row in weights if row.trace_index >= 0]
    kept = (WeightStatus.TRUNCATED, WeightStatus.GOLD)
    return [row if row.status in kept else replace(row, status=WeightStatus.UNVERIFIABLE) for row in weights]


def _unused(score: Score) -> Weight:
    """A trace beyond `objective.num_traces`."""
    return Weight(score.question_id, score.trace_index, score.round, 0.0, 0.0, 0.0, 0.0, WeightStatus.UNUSED)


def _mean_bounds(bounds: Sequence[Bound]) -> dict[str, float]:
    """Means over the questions: KL(q || pi), entropy of the weights, each L_K over those with at least K closed traces.

    `bound_K_questions` is their number where truncated traces exclude some.
    """
    if not bounds:
        return {}
    means = {
        "kl_posterior_policy": float(np.mean([bound.kl_posterior_policy for bound in bounds])),
        "weight_entropy": float(np.mean([bound.weight_entropy for bound in bounds])),
    }
    for size in range(1, max(bound.num_traces for bound in bounds) + 1):
        having = [bound for bound in bounds if bound.num_traces >= size]
        means[f"bound_{size}"] = float(np.mean([bound.bounds[size - 1] for bound in having]))
        means[f"bound_{size}_geometric_mean"] = float(
            np.mean([bound.bounds_geometric_mean[size - 1] for bound in having])
        )
        if len(having) < len(bounds):
            means[f"bound_{size}_questions"] = float(len(having))
    return means


def counted_scores(traces: Sequence[Trace], answers: Sequence[Answer]) -> list[Score]:
    """Scores of policy rollouts for the accuracy estimator: counts of answers, and the serving engine's log-probs."""
    answers_of = answers_by_trace(answers)
    scores = []
    for trace in traces:
        group = answers_of[trace.question_id, trace.trace_index]
        logps = np.zeros(0, np.float32) if trace.logp_engine is None else trace.logp_engine
        key = (trace.question_id, trace.trace_index, trace.round)
        scores.append(Score(*key, logps, None, None, len(group) or None, count_correct(group) if group else None))
    return scores


def engine_difference(traces: Sequence[Trace], scores: Sequence[Score]) -> float:
    """Largest difference between the serving and the training engine's log-probs of the sampler's traces.

    Meaningful only where sampling and scoring temperatures are equal: the serving engine reports log-probs of
    logits / temperature.
    """
    score_of = {(score.question_id, score.trace_index): score for score in scores}
    largest = 0.0
    for trace in traces:
        scored = score_of[trace.question_id, trace.trace_index].logp_posterior
        if trace.logp_engine is not None and scored is not None and len(scored):
            largest = max(largest, float(np.abs(trace.logp_engine - scored).max()))
    return largest
