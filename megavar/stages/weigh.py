"""Turns scores into weights, question by question, and returns statistics of them."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from pathlib import Path

import numpy as np

from megavar.config.schema import ObjectiveConfig, RunConfig
from megavar.joins import OUTPUTS_DO_NOT_MATCH, answers_by_trace, by_question, check_complete, count_correct
from megavar.objectives import get_objective
from megavar.objectives.base import Objective
from megavar.objectives.bounds import estimate_bounds
from megavar.objectives.importance import effective_sample_size, weigh_by_reference
from megavar.ranks import on_rank_zero
from megavar.record_files import RecordFileWriter, read_records, rows, sorted_table, table_of
from megavar.records import Answer, Bound, Score, Trace, TraceFinish, Weight, WeightStatus, identity
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import log_values, output

logger = logging.getLogger(__name__)

LOW_ESS = 1.2
LARGE_DIFFERENCE_NATS = {"fp32": 0.01, "bf16": 1.0}
"""Of one token: the largest of a whole round is far above the mean, most of all where engines round to bf16."""

Group = tuple[Sequence[Trace], Sequence[Score]]
"""Traces and scores of some questions."""


def execute(run: Run, service: RolloutService) -> None:
    """The weight of every trace among those of its question."""

    def work() -> None:
        objective, differences, noise = run.config.objective, [0.0], _NoiseFloor(run)
        if objective.max_leakage is not None and output(run.round / "scores", Score).absent:
            raise ValueError(
                f"objective.max_leakage={objective.max_leakage} needs the leakage of traces, but {run.round}/scores is "
                f"of a version that did not measure it; remove that folder and the entry {run.entry('score')} of "
                "manifest.json and run the same command again, or use max_leakage=null."
            )

        def groups() -> Iterator[Group]:
            for traces, scores in scored_traces(run):
                differences.append(engine_difference(traces, scores))
                noise.add(traces, scores)
                yield traces, scores

        values = weigh_traces(groups(), objective.name, objective, run.round / "weights") | noise.values()
        if run.config.score.temperature == run.config.sample.temperature:
            values["largest_engine_difference"] = max(differences)
        _warn(values, run.config)
        log_values(run, "weigh", {run.round_index: values})

    on_rank_zero(work)


def scored_traces(run: Run) -> Iterator[Group]:
    """The round's traces, without their tokens, and their scores, some questions at a time."""
    columns = ("question_id", "trace_index", "round", "logp_engine", "finish")
    files = output(run.round / "traces", Trace, *columns), output(run.round / "scores", Score)
    for traces, scores in by_question(*files):
        yield rows(traces, Trace), rows(scores, Score)


def _warn(values: dict[str, float], config: RunConfig) -> None:
    """Say what a run should not go on with unseen."""
    if 0 < values["ess"] < LOW_ESS and config.num_traces > 1:
        logger.warning(
            "weigh: the effective sample size is %.2f of %d traces: one trace a question decides "
            "(docs/troubleshooting.md#ess-near-1).",
            values["ess"],
            config.num_traces,
        )
    if config.objective.max_leakage is not None and "leakage" not in values:
        logger.warning(
            "weigh: no trace says its question's answer, so objective.max_leakage=%g leaves out none "
            "(docs/method.md#leakage).",
            config.objective.max_leakage,
        )
    difference = values.get("largest_engine_difference", 0.0)
    if difference > LARGE_DIFFERENCE_NATS["fp32" if config.score_recipe == "fp32" else "bf16"]:
        logger.warning(
            "weigh: log-probs of serving and training engine differ by up to %.3g nats "
            "(docs/troubleshooting.md#large-engine-difference).",
            difference,
        )


def weigh_traces(groups: Iterable[Group], objective: str, config: ObjectiveConfig, folder: Path) -> dict[str, float]:
    """Write a `Weight` for every trace and a `Bound` for every question to `folder`, and return the totals.

    Args:
        groups: traces and scores of some questions at a time, in order of the question ids.

    Raises:
        ValueError: if scores and traces are not of the same traces, or lack what the objective needs.
    """
    totals = _Totals()
    with ExitStack() as files:
        weights_file = files.enter_context(RecordFileWriter(folder / "data.parquet", Weight))
        bounds_file: RecordFileWriter | None = None
        for traces, scores in groups:
            weights, bounds = _weigh_group(objective, traces, scores, config, totals)
            of_traces = (identity(weight) for weight in weights if weight.status != WeightStatus.GOLD)
            check_complete(sorted(of_traces), sorted(map(identity, traces)), folder)
            weights_file.write(sorted_table(table_of(weights, Weight), Weight))
            if bounds and bounds_file is None:
                bounds_file = files.enter_context(RecordFileWriter(folder / "bounds.parquet", Bound))
            if bounds_file is not None:
                bounds_file.write(table_of(bounds, Bound))
    return totals.values()


def _weigh_group(
    name: str, traces: Sequence[Trace], scores: Sequence[Score], config: ObjectiveConfig, totals: "_Totals"
) -> tuple[list[Weight], list[Bound]]:
    objective = get_objective(name)
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
    weights: list[Weight] = []
    groups: list[tuple[list[Score], list[bool], list[Weight]]] = []
    for question_id in sorted(of_question):
        every = sorted(of_question[question_id], key=lambda score: score.trace_index)
        truncated = [finish_of[question_id, score.trace_index] != TraceFinish.CLOSED for score in every]
        group = every[: config.num_traces]
        cut = truncated[: len(group)]
        before = _weigh_question(objective, group, cut, config)
        group_weights = _without_leaky(objective, group, cut, config, before)
        for given in (before, group_weights):
            _check_weights(given, group, name)
        totals.leakage.add(group, cut, before, group_weights)
        weights += group_weights + [_unused(score) for score in every[len(group) :]]
        groups.append((every, truncated, group_weights))
        totals.add_question(group_weights)
    bounds = estimate_bounds(*zip(*groups, strict=True)) if groups else []
    totals.statuses.update(weight.status for weight in weights)
    totals.bounds.add(bounds)
    return weights, bounds


def _check_weights(weights: Sequence[Weight], group: Sequence[Score], name: str) -> None:
    """Refuse what an objective of the user's own may have got wrong, which would be left out of training unseen."""
    question, expected = group[0].question_id, [score.trace_index for score in group]
    found = sorted(row.trace_index for row in weights if row.status != WeightStatus.GOLD)
    if found != expected:
        raise ValueError(
            f"objective.name={name} gave weights to traces {found} of question {question!r}, expected {expected}: one "
            "for each score that it is given; correct the objective."
        )
    for row in weights:
        if not isfinite(row.weight):
            raise ValueError(
                f"objective.name={name}: the weight of trace {row.trace_index} of question {question!r} is "
                f"{row.weight}, expected a finite number; correct the objective."
            )


def _weigh_question(
    objective: Objective, group: Sequence[Score], truncated: Sequence[bool], config: ObjectiveConfig
) -> list[Weight]:
    """Weights of one question's traces; one without a verifier is weighed by its reference answer, or not at all."""
    if all(score.num_answers != 0 for score in group):
        return objective.weigh(group, truncated, config)
    weigh = weigh_by_reference if config.answer_estimator == "accuracy" else objective.weigh
    weights = (objective.weigh_unverifiable or weigh)(group, truncated, config)
    if config.on_unverifiable == "drop":
        weights = [replace(row, weight=0.0) for row in weights if row.trace_index >= 0]
    kept = (WeightStatus.TRUNCATED, WeightStatus.GOLD)
    return [row if row.status in kept else replace(row, status=WeightStatus.UNVERIFIABLE) for row in weights]


def _without_leaky(
    objective: Objective,
    group: Sequence[Score],
    truncated: Sequence[bool],
    config: ObjectiveConfig,
    weights: list[Weight],
) -> list[Weight]:
    """Weights of one question's traces if those above `objective.max_leakage` are left out, as truncated ones are.

    Args:
        weights: of all of them.
    """
    limit = np.inf if config.max_leakage is None else config.max_leakage
    leaky = {score.trace_index for score in group if score.leakage is not None and score.leakage > limit}
    if not leaky:
        return weights
    left_out = [cut or score.trace_index in leaky for score, cut in zip(group, truncated, strict=True)]
    marked = {
        row.trace_index: replace(row, log_weight=-np.inf, weight=0.0, status=WeightStatus.LEAKY)
        for row in weights
        if row.trace_index in leaky
    }
    return [marked.get(row.trace_index, row) for row in _weigh_question(objective, group, left_out, config)]


def _unused(score: Score) -> Weight:
    """A trace beyond `objective.num_traces`."""
    return Weight(score.question_id, score.trace_index, score.round, 0.0, 0.0, 0.0, 0.0, WeightStatus.UNUSED)


class _NoiseFloor:
    """How far rounding moves weights, by the traces that were scored again in other packs.

    Of each value the standard deviation of one scoring: the root mean square of the differences, over the root of 2.
    """

    def __init__(self, run: Run) -> None:
        file = run.round / "scores" / "again.parquet"
        again = read_records(file, Score) if file.exists() else []  # no trace was closed
        self._again = {identity(score): score for score in again}
        self._questions = {score.question_id for score in again}
        self._config = run.config.objective
        self._differences: list[tuple[float, float]] = []

    def add(self, traces: Sequence[Trace], scores: Sequence[Score]) -> None:
        """Weigh the questions among these that were scored twice, by either scores."""
        traces = [trace for trace in traces if trace.question_id in self._questions]
        first = [score for score in scores if score.question_id in self._questions]
        second = [self._scored_again(score) for score in first]
        pairs = zip(*(self._weights(traces, scores) for scores in (first, second)), strict=True)
        self._differences += [(a.log_ratio - b.log_ratio, a.weight - b.weight) for a, b in pairs]

    def _scored_again(self, score: Score) -> Score:
        again = self._again.get(identity(score))
        if again is None:
            return score
        return replace(
            score, logp_policy=again.logp_policy, logp_posterior=again.logp_posterior, logp_answer=again.logp_answer
        )

    def _weights(self, traces: Sequence[Trace], scores: Sequence[Score]) -> list[Weight]:
        """Of the traces that were scored twice."""
        weights, _ = _weigh_group(self._config.name, traces, scores, self._config, _Totals())
        return [row for row in weights if identity(row) in self._again and row.status != WeightStatus.UNUSED]

    def values(self) -> dict[str, float]:
        if not self._differences:
            return {}
        log_ratio, weight = np.sqrt(np.mean(np.square(self._differences), axis=0) / 2).tolist()
        return {"log_ratio_noise": log_ratio, "weight_noise": weight}


class _Totals:
    """What is logged of a round's weights, added up question by question."""

    def __init__(self) -> None:
        self.statuses: Counter[WeightStatus] = Counter()
        self.bounds = _MeanBounds()
        self.leakage = _MeanLeakage()
        self._num_questions = self._num_with_weight = 0
        self._sum_of_sizes = 0.0

    def add_question(self, weights: Sequence[Weight]) -> None:
        self._num_questions += 1
        if any(weight.weight > 0 for weight in weights):
            self._num_with_weight += 1
            self._sum_of_sizes += effective_sample_size(np.array([weight.weight for weight in weights]))

    def values(self) -> dict[str, float]:
        return {
            "questions": float(self._num_questions),
            "questions_with_weight": float(self._num_with_weight),
            "ess": self._sum_of_sizes / max(self._num_with_weight, 1),
            **self.bounds.values(),
            **self.leakage.values(),
            **{f"traces_{status}": float(count) for status, count in sorted(self.statuses.items())},
        }


class _MeanLeakage:
    """Means over the closed traces, and the weight that was left out; nothing if no trace says its answer."""

    def __init__(self) -> None:
        self._num_closed = self._num_saying = 0
        self._sum = self._posterior_sum = self._weighted_sum = self._weight = 0.0
        self._before = self._left_out = 0.0

    def add(
        self, scores: Sequence[Score], truncated: Sequence[bool], before: Sequence[Weight], after: Sequence[Weight]
    ) -> None:
        """Add one question's traces.

        Args:
            before: the weights if no trace were left out for its leakage.
        """
        self._num_closed += len(truncated) - sum(truncated)
        weight_of = {row.trace_index: row.weight for row in after}
        for score in scores:
            if score.leakage is not None:
                weight = weight_of[score.trace_index]
                self._num_saying += 1
                self._sum += score.leakage
                self._posterior_sum += score.leakage_posterior or 0.0
                self._weighted_sum += weight * score.leakage
                self._weight += weight
        leaky = {row.trace_index for row in after if row.status == WeightStatus.LEAKY}
        self._before += sum(row.weight for row in before)
        self._left_out += sum(row.weight for row in before if row.trace_index in leaky)

    def values(self) -> dict[str, float]:
        if not self._num_saying:
            return {}
        found = {
            "answer_in_trace": self._num_saying / self._num_closed,
            "leakage": self._sum / self._num_saying,
            "leakage_posterior": self._posterior_sum / self._num_saying,
        }
        if self._weight > 0:
            found["leakage_weighted"] = self._weighted_sum / self._weight
        if self._left_out > 0:
            found["leaky_weight"] = self._left_out / self._before
        return found


class _MeanBounds:
    """Means over the questions: KL(q || pi), entropy of the weights, each L_K over those with at least K closed traces.

    `bound_K_questions` is their number where truncated traces exclude some.
    """

    def __init__(self) -> None:
        self._num_questions = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._num_having: list[int] = []

    def add(self, bounds: Sequence[Bound]) -> None:
        self._num_questions += len(bounds)
        for bound in bounds:
            self._sums["kl_posterior_policy"] += bound.kl_posterior_policy
            self._sums["weight_entropy"] += bound.weight_entropy
            self._num_having += [0] * (bound.num_traces - len(self._num_having))
            for place in range(bound.num_traces):
                self._num_having[place] += 1
                self._sums[f"bound_{place + 1}"] += float(bound.bounds[place])
                self._sums[f"bound_{place + 1}_geometric_mean"] += float(bound.bounds_geometric_mean[place])

    def values(self) -> dict[str, float]:
        if not self._num_questions:
            return {}
        means = {name: self._sums[name] / self._num_questions for name in ("kl_posterior_policy", "weight_entropy")}
        for size, count in enumerate(self._num_having, start=1):
            for name in (f"bound_{size}", f"bound_{size}_geometric_mean"):
                means[name] = self._sums[name] / count
            if count < self._num_questions:
                means[f"bound_{size}_questions"] = float(count)
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
