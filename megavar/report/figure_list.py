"""The figures of the report with their titles and captions, in order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megavar.data.answer_in_trace import AnswerFinder
from megavar.evaluation.pass_at_k import Accuracy
from megavar.evaluation.results import Results
from megavar.report import curves, figures
from megavar.report.run_view import Round, RunView

PassCurves = dict[str, dict[str, list[Accuracy]]]
_RATIOS = {
    "geometric_mean": "mean over the trace of log π − log q",
    "sequence": "sum over the trace of log π − log q",
    "none": "log-ratio (objective.ratio=none)",
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its file name (without .png), title and caption."""

    name: str
    title: str
    caption: str
    figure: Figure


def evaluated_curves(runs: Mapping[str, RunView]) -> PassCurves:
    """{run label: {model: pass@k for k = 1..n}} of all runs with an evaluated model."""
    passes: PassCurves = {}
    for label, run in runs.items():
        answers_of = run.evaluated()
        if answers_of:
            questions, config = run.eval_questions(), run.config
            passes[label] = {
                model: curves.pass_curve(questions, answers, config.eval, config.seed)
                for model, answers in answers_of.items()
            }
    return passes


def make_figures(
    runs: Mapping[str, RunView], last_round: Round, passes: PassCurves, finder: AnswerFinder
) -> list[ReportFigure]:
    """All figures that the runs have records for.

    Args:
        runs: by label; the first is the run of the report, the others are compared with it.
        last_round: of the first run.
        passes: see `evaluated_curves`.
        finder: of answers in rollouts.
    """
    run = next(iter(runs.values()))
    report_figures = [
        ReportFigure(
            "training",
            "Training",
            "Loss and global gradient norm per optimizer step; one column per training stage.",
            figures.training_curves({label: other.metrics for label, other in runs.items()}),
        )
    ]
    if passes:
        report_figures.append(
            ReportFigure(
                "pass_at_k",
                "Held-out accuracy",
                "pass@k: unbiased estimate of the probability that at least one of k samples is correct, with 95 % "
                "bootstrap intervals over questions.",
                figures.pass_curves(passes),
            )
        )
    if (results := run.suites()) is not None:
        report_figures.append(of_suites(results))
    return [
        *report_figures,
        _against_num_traces(runs, last_round, passes),
        *_of_round(run, last_round),
        *_leakage(run, last_round, finder),
    ]


def of_suites(results: Results) -> ReportFigure:
    """Of every model on every suite."""
    return ReportFigure(
        "suites",
        "Suites",
        "avg@n: share of correct samples. pass@k: unbiased estimate of the probability that at least one of k samples "
        "is correct. maj@n: share of questions whose most frequent answer is correct, ties drawn at random. With 95 % "
        "bootstrap intervals over questions.",
        figures.suite_intervals(results),
    )


def _against_num_traces(runs: Mapping[str, RunView], last_round: Round, passes: PassCurves) -> ReportFigure:
    first = next(iter(runs))
    fewer = {}
    for label, run in runs.items():
        if label == first or run.rounds():
            compared = last_round if label == first else run.last_round()
            objective = run.config.objective.name
            fewer[label] = curves.fewer_traces(compared.scores, compared.weights, objective, run.config.seed)
    finals = {
        label: (runs[label].config.num_traces, list(models.values())[-1][0])
        for label, models in passes.items()
        if list(models) != ["pi_0"]
    }
    return ReportFigure(
        "traces",
        "Accuracy against K",
        "Expected results with fewer traces, averaged over subsets of the sampled traces: the fraction of questions "
        "with a correct trace among K, and the mean effective sample size (ESS) of the questions with weights; at full "
        "K only for objectives whose weights do not follow from log-weights. Final pass@1 is shown if runs with "
        "different K are compared.",
        figures.trace_number_curves(fewer, finals),
    )


def _noise_of_weights(run: RunView) -> str:
    noise = [row["weight_noise"] for row in run.metrics if row["stage"] == "weigh" and "weight_noise" in row]
    if not noise:
        return ""
    return (
        f" Rounding moves a weight by {noise[-1]:.2g} (standard deviation, of traces that were scored twice): smaller "
        "differences between weights mean nothing."
    )


def _leakage(run: RunView, last_round: Round, finder: AnswerFinder) -> list[ReportFigure]:
    of_models = {
        "q" if run.config.sample.sampler == "posterior" else "policy": curves.leakages(
            last_round.traces, last_round.scores, last_round.weights
        ),
        "policy's rollouts": curves.rollout_leakages(
            last_round.rollouts, last_round.rollout_weights, last_round.questions, finder
        ),
    }
    found = {label: leakages for label, leakages in of_models.items() if leakages is not None}
    if not found:
        return []
    return [
        ReportFigure(
            "leakage",
            "Leakage",
            "Where closed traces first say the question's answer, and the leakage there: −log π(answer | x, the trace "
            "before it). Near 0 the policy derives the answer, where it is large the trace leaps to it. Filled: every "
            "trace equally; lines: by weight. Of rollouts, log-probs are the server's, of those traces that have them."
            + _left_out(run),
            figures.leakage_histograms(found),
        )
    ]


def _left_out(run: RunView) -> str:
    values: dict[str, Any] = next((row for row in reversed(run.metrics) if row["stage"] == "weigh"), {})
    if "traces_leaky" not in values:
        return ""
    return (
        f" {values['traces_leaky']:.0f} traces above objective.max_leakage={run.config.objective.max_leakage:g} nats "
        f"were left out, which had {values.get('leaky_weight', 0.0):.1%} of the weight."
    )


def _of_round(run: RunView, last_round: Round) -> list[ReportFigure]:
    config = run.config
    ess_of = curves.question_ess(last_round.weights)
    per_question = config.sample.num_traces * config.sample.num_answers
    label = f"answers after {'q' if config.sample.sampler == 'posterior' else 'the policy'}'s traces"
    accuracies = {label: curves.question_accuracies(last_round.answers, list(ess_of), per_question)}
    held_out = run.evaluated().get("pi_0")
    if held_out:
        ids = [question.id for question in run.eval_questions()]
        accuracies["π₀, held-out questions"] = curves.question_accuracies(held_out, ids, config.eval.num_samples)
    return [
        ReportFigure(
            "densities",
            "Densities",
            "Left: length of each closed trace against the log-ratio in its weight. Right: length of the reference "
            "answer against its log-likelihood under the policy after each trace. The colour scale is logarithmic.",
            figures.densities(
                curves.ratios_by_length(last_round.traces, last_round.weights),
                curves.likelihoods_by_length(last_round.scores),
                _RATIOS[config.objective.ratio],
            ),
        ),
        ReportFigure(
            "implied_weight",
            "Implied question weight",
            "Top: weight that each objective gives to a question with probability P of a correct answer. GRPO's weight "
            "diverges towards P = 1 and is 0 at P = 1. Bottom: distribution of this run's questions. Traces of q are "
            "sampled with the hint, so the accuracy after them is not the policy's own; that on the held-out questions "
            "is.",
            figures.implied_weights(accuracies),
        ),
        ReportFigure(
            "effective_sample_size",
            "Effective sample size",
            "ESS = (Σ w)² / Σ w² over the traces of each question. The bar at 0 shows questions without weights."
            + _noise_of_weights(run),
            figures.ess_histogram(np.array(list(ess_of.values())), config.num_traces),
        ),
    ]
