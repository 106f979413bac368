"""Plots the report's figures with matplotlib, on a white background and without a display.

Functions take numbers, not folders, and return one figure each. Colours follow the order of the runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from megavar.evaluation.pass_at_k import Accuracy
from megavar.evaluation.results import Results
from megavar.report.curves import IMPLIED_WEIGHTS, FewerTraces, Floats, Leakages

_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#6b5b4b")
_LINES = ("-", "--", ":", "-.")
_MAX_LENGTH_BINS = 60
_MIN_LENGTHS = 10


def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss (top) and gradient norm (bottom) against optimizer step, one column per training stage.

    Args:
        metrics: run label -> rows of metrics.jsonl.
    """
    rows = [row for run_rows in metrics.values() for row in run_rows if "loss" in row]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = _grid(2, max(len(stages), 1), 3.6, 2.5, sharex="col")
    for column, stage in enumerate(stages):
        for line, (key, label) in enumerate((("loss", "loss"), ("grad_norm", "gradient norm"))):
            plot = axes[line][column]
            for number, (name, run_rows) in enumerate(metrics.items()):
                points = [(row["step"], row[key]) for row in run_rows if row["stage"] == stage and key in row]
                if points:
                    line_style = _LINES[number // len(_COLOURS) % len(_LINES)]
                    plot.plot(
                        *zip(*points, strict=True),
                        color=_colour(number), linestyle=line_style, linewidth=1.2, label=name,
                    )  # fmt: skip
            plot.set_yscale("log")
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plot.yaxis.set_major_formatter("{x:g}")
            plot.yaxis.set_minor_formatter(NullFormatter())
            _label(plot, stage if line == 0 else "", "step" if line else "", label if column == 0 else "")
        if len(metrics) > 1:
            axes[0][column].legend(fontsize=7)
    return figure


def pass_curves(curves: Mapping[str, Mapping[str, Sequence[Accuracy]]]) -> Figure:
    """pass@k against k of every model of every run, with intervals.

    Args:
        curves: {run label: {model: points}}.
    """
    figure, ((plot,),) = _grid(1, 1, 6.0, 3.8)
    for number, (name, models) in enumerate(curves.items()):
        for index, (model, points) in enumerate(models.items()):
            style: dict[str, Any] = {"color": _colour(number), "linestyle": _LINES[index % len(_LINES)]}
            ks = [point.k for point in points]
            plot.fill_between(
                ks, [p.low for p in points], [p.high for p in points], color=style["color"], alpha=0.13, linewidth=0
            )
            plot.plot(ks, [p.mean for p in points], **style, marker="o", markersize=3, label=f"{name}: {model}")
    plot.set_ylim(0, 1.02)
    plot.xaxis.get_major_locator().set_params(integer=True)
    plot.legend(fontsize=8, loc="lower right")
    _label(plot, "", "k", "pass@k")
    return figure


def suite_intervals(results: Results) -> Figure:
    """The accuracies of every model on every suite with their intervals, one column for each metric."""
    suites = list(results.suites.items())
    metrics = [name for name in next(iter(suites[0][1].models.values())) if "@" in name]
    models = list(suites[0][1].models)
    figure, (plots,) = _grid(1, len(metrics), 3.6, 1.0 + 0.22 * len(suites) * (len(models) + 1), sharey="row")
    for plot, metric in zip(plots, metrics, strict=True):
        for number, model in enumerate(models):
            found = [suite.models[model][metric] for _, suite in suites]
            means, heights = (
                [row.mean for row in found],
                np.arange(len(suites)) + 0.8 * (number + 1) / (len(models) + 1),
            )
            error = [[row.mean - row.low for row in found], [row.high - row.mean for row in found]]
            plot.errorbar(
                means, heights - 0.4, xerr=error, fmt="o", capsize=3, markersize=4, color=_colour(number), label=model
            )
        _label(plot, "", metric, "")
        plot.set_xlim(-0.02, 1.02)
    plots[0].set_yticks(range(len(suites)), [name for name, _ in suites])
    plots[0].set_ylim(len(suites) - 0.5, -0.5)
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8, ncols=4)
    return figure


def trace_number_curves(
    fewer: Mapping[str, Sequence[FewerTraces]], finals: Mapping[str, tuple[int, Accuracy]]
) -> Figure:
    """Questions with a correct trace, ESS and, if runs differ in K, final pass@1 against K.

    Args:
        fewer: run label -> points, for runs with weights.
        finals: run label -> (K, pass@1 of the final policy); plotted if there are at least two values of K.
    """
    compared = len({number for number, _ in finals.values()}) > 1
    figure, (plots,) = _grid(1, 3 if compared else 2, 3.9, 3.2)
    for number, (name, points) in enumerate(fewer.items()):
        ks = [point.num_traces for point in points]
        style: dict[str, Any] = {"color": _colour(number), "marker": "o", "markersize": 4, "label": name}
        plots[0].plot(ks, [point.correct for point in points], **style)
        plots[1].plot(ks, [point.ess for point in points], **style)
    plots[0].set_ylim(0, 1.02)
    plots[1].set_ylim(bottom=0)
    _label(plots[0], "", "K (traces per question)", "questions with a correct trace")
    _label(plots[1], "", "K (traces per question)", "mean effective sample size")
    if compared:
        for number, (name, (num_traces, point)) in enumerate(finals.items()):
            error = [[point.mean - point.low], [point.high - point.mean]]
            plots[2].errorbar([num_traces], [point.mean], error, fmt="o", capsize=3, color=_colour(number), label=name)
        _label(plots[2], "", "K of the run", "final pass@1")
    for plot in plots:
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter("{x:g}")
        if len(fewer) + len(finals) > 2:
            plot.legend(fontsize=7)
    return figure


def densities(ratios: tuple[Floats, Floats], likelihoods: tuple[Floats, Floats], ratio_label: str) -> Figure:
    """Two 2D histograms: trace tokens x log-ratio, reference answer tokens x log-likelihood.

    Args:
        ratios: ([traces] tokens, [traces] log-ratio).
        likelihoods: ([traces] tokens, [traces] log-likelihood).
        ratio_label: y label of the first.
    """
    figure, (plots,) = _grid(1, 2, 4.8, 3.4)
    labels = (("trace tokens", ratio_label), ("reference answer tokens", "log π(y′ | x, z)"))
    for plot, (tokens, values), (x_label, y_label) in zip(plots, (ratios, likelihoods), labels, strict=True):
        _label(plot, "", x_label, y_label)
        finite = np.isfinite(values)
        if not finite.any():
            plot.text(0.5, 0.5, "no scored rows", ha="center", transform=plot.transAxes)
            continue
        bins = (length_bins(tokens[finite]), 50)
        *_, image = plot.hist2d(tokens[finite], values[finite], bins, norm=LogNorm(), cmap="viridis")
        plot.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=plot, label="traces")
    return figure


def length_bins(tokens: Floats) -> Floats:
    """Edges of at most 60 bins of equal integer width, centred on integers.

    They span at least 10 lengths, so that a single length does not fill the plot.
    """
    spare = max(_MIN_LENGTHS - 1 - int(np.ptp(tokens)), 0)
    first = max(int(tokens.min()) - spare // 2, 0)
    last = max(int(tokens.max()), first + _MIN_LENGTHS - 1)
    width = -(-(last - first + 1) // _MAX_LENGTH_BINS)
    return np.arange(first, last + width + 1, width, dtype=np.float64) - 0.5


def implied_weights(accuracies: Mapping[str, Floats]) -> Figure:
    """Implied weight of each objective against P (top), and histograms of the questions' accuracies (bottom).

    Args:
        accuracies: label -> [questions] accuracy.
    """
    figure, axes = _grid(2, 1, 6.0, 2.4, sharex="col")
    top, bottom = axes[0][0], axes[1][0]
    grid = np.linspace(0.0, 1.0, 401)
    for number, (label, weight) in enumerate(IMPLIED_WEIGHTS.items()):
        # At P = 1 GRPO's weight drops from its pole to 0, which would be plotted as a slope.
        interior = grid[1:-1]
        style: dict[str, Any] = {"color": _colour(number), "linestyle": _LINES[number % 3], "label": label}
        top.plot(interior, [weight(float(p)) for p in interior], **style)
    top.set_ylim(0, 4)
    top.legend(fontsize=8, loc="upper left")
    _label(top, "", "", "implied weight")
    bins = np.linspace(-0.025, 1.025, 22)
    for number, (label, values) in enumerate(accuracies.items()):
        fractions = np.full(len(values), 1 / max(len(values), 1))
        bottom.hist(values, bins, weights=fractions, color=_colour(number), alpha=0.45, label=label)
    bottom.margins(y=0.4)  # space for the legend
    bottom.legend(fontsize=8, loc="upper left")
    _label(bottom, "", "P (accuracy on the question)", "fraction of questions")
    return figure


def leakage_histograms(of_models: Mapping[str, Leakages]) -> Figure:
    """Where traces first say their answer and their leakage: all equally (filled), and by their weights (lines)."""
    figure, (plots,) = _grid(1, 2, 4.8, 3.2)
    nats = [found.nats[np.isfinite(found.nats)] for found in of_models.values()]
    largest = max((float(values.max()) for values in nats if len(values)), default=0.0)
    bins = (np.linspace(0, 1, 21), np.linspace(0, max(largest, 1.0), 41))
    for number, (label, found) in enumerate(of_models.items()):
        style: dict[str, Any] = {"color": _colour(number), "label": f"{label} ({found.share:.0%} say it)"}
        for plot, edges, values in zip(plots, bins, (found.positions, found.nats), strict=True):
            known = np.isfinite(values)
            if not known.any():
                continue
            plot.hist(values[known], edges, weights=np.full(known.sum(), 1 / known.sum()), alpha=0.35, **style)
            total = found.weights[known].sum()
            if total > 0:
                shares = found.weights[known] / total
                weighted = {**style, "label": f"{label}, weighted"}
                plot.hist(values[known], edges, weights=shares, histtype="step", linewidth=1.5, **weighted)
    _label(plots[0], "", "part of the trace before the answer", "fraction of the traces that say it")
    _label(plots[1], "", "leakage, nats", "")
    plots[0].legend(fontsize=7)
    return figure


def ess_histogram(ess: Floats, num_traces: int) -> Figure:
    """Histogram of the questions' effective sample sizes; questions without weights are the bar at 0."""
    figure, ((plot,),) = _grid(1, 1, 6.0, 2.8)
    plot.hist(ess, np.arange(-0.125, num_traces + 0.26, 0.25), color=_colour(0))
    _label(plot, "", f"effective sample size of {num_traces} traces", "questions")
    return figure


def _grid(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, Any]:
    figure = Figure((width * columns, height * rows), dpi=160, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _label(plot: Axes, title: str, x_label: str, y_label: str) -> None:
    plot.set_title(title, fontsize=10)
    plot.set_xlabel(x_label)
    plot.set_ylabel(y_label)
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
