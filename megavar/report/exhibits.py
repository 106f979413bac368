"""Which figures the report shows, in which order, and what is said under each."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from megavar.evaluation.pass_at_k import Accuracy
from megavar.report import curves, figures
from megavar.report.finished import FinishedRun, Round

PassCurves = dict[str, dict[str, list[Accuracy]]]
_RATIOS = {
    "geometric_mean": "mean over the trace of log π − log q",
    "sequence": "sum over the trace of log π − log q",
    "none": "log-ratio (objective.ratio=none)",
}


@dataclass(frozen=True)
class Exhibit:
    """A figure with its file name, title and caption."""

    name: str
    title: str
    caption: str
    figure: Figure


def evaluated_curves(runs: Mapping[str, FinishedRun]) -> PassCurves:
    """{run: {model: pass@k for k = 1..n}} of the runs that have evaluated a model."""
    found: PassCurves = {}
    for label, run in runs.items():
        answers_of = run.evaluated()
        if answers_of:
            questions, config = run.eval_questions(), run.config
            found[label] = {
                model: curves.pass_curve(questions, answers, config.eval, config.seed)
                for model, answers in answers_of.items()
            }
    return found


def make_exhibits(runs: Mapping[str, FinishedRun], found: Round, passes: PassCurves) -> list[Exhibit]:
    """Every figure that the runs have records for; `found` is the last round of the first of them."""
    run = next(iter(runs.values()))
    exhibits = [
        Exhibit(
            "training",
            "Training",
            "Loss and global gradient norm of every optimizer step, a column for each training stage.",
            figures.training_curves({label: other.metrics for label, other in runs.items()}),
        )
    ]
    if passes:
        exhibits.append(
            Exhibit(
                "pass_at_k",
                "Held-out accuracy",
                "The unbiased chance that one of k samples is correct, with 95 % bootstrap intervals over questions.",
                figures.pass_curves(passes),
            )
        )
    return [*exhibits, _against_traces(runs, found, passes), *_of_round(run, found)]


def _against_traces(runs: Mapping[str, FinishedRun], found: Round, passes: PassCurves) -> Exhibit:
    first = next(iter(runs))
    fewer = {}
    for label, run in runs.items():
        if label == first or run.rounds():
            other = found if label == first else run.last_round()
            objective = run.config.objective.name
            fewer[label] = curves.fewer_traces(other.scores, other.weights, objective, run.config.seed)
    finals = {
        label: (runs[label].config.num_traces, list(models.values())[-1][0])
        for label, models in passes.items()
        if list(models) != ["pi_0"]
    }
    return Exhibit(
        "traces",
        "Accuracy against K",
        "What the round would have with fewer of its traces: the share of questions with a correct trace among K, and "
        "the mean effective sample size of the questions that would have weights, over subsets of the traces at hand. "
        "That of objectives other than iwae, rft and reinforce is told of all traces only. Final pass@1 is drawn where "
        "runs of several K are compared.",
        figures.trace_number_curves(fewer, finals),
    )


def _of_round(run: FinishedRun, found: Round) -> list[Exhibit]:
    config = run.config
    sizes = curves.question_sizes(found.weights)
    per_question = config.sample.num_traces * config.sample.num_answers
    label = f"answers after {'q' if config.sample.sampler == 'posterior' else 'the policy'}'s traces"
    accuracies = {label: curves.question_accuracies(found.answers, list(sizes), per_question)}
    held_out = run.evaluated().get("pi_0")
    if held_out:
        ids = [question.id for question in run.eval_questions()]
        accuracies["π₀ alone, held-out questions"] = curves.question_accuracies(held_out, ids, config.eval.num_samples)
    return [
        Exhibit(
            "densities",
            "Densities",
            "Left: closed traces by their length and the log-ratio in their weight. Right: the reference answer's "
            "length and its log-likelihood under the policy after each trace. The colour scale is logarithmic.",
            figures.densities(
                curves.ratios_by_length(found.traces, found.weights),
                curves.likelihoods_by_length(found.scores),
                _RATIOS[config.objective.ratio],
            ),
        ),
        Exhibit(
            "implied_weight",
            "Implied weight of a question",
            "How much an objective counts a question that the policy answers with probability P, and where this run's "
            "questions are. GRPO's curve has a pole at P = 1 and is 0 there. q's traces are drawn with the hint, so "
            "answers after them are not the policy's own accuracy; its own is that on the held-out questions.",
            figures.implied_weights(accuracies),
        ),
        Exhibit(
            "effective_sample_size",
            "Effective sample size",
            "(Σ w)² / Σ w² of every question's traces. The bar at 0 is the questions without weights.",
            figures.size_histogram(np.array(list(sizes.values())), config.num_traces),
        ),
    ]
