"""Draws the report's figures with matplotlib, on paper-white and without a display.

Every function returns one figure and takes numbers, not folders; the first run named is the first colour.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from megavar.evaluation.pass_at_k import Accuracy
from megavar.report.curves import IMPLIED_WEIGHTS, FewerTraces, Floats

_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#6b5b4b")
_LINES = ("-", "--", ":", "-.")
_MOST_LENGTH_BINS = 60
_LEAST_LENGTHS = 10


def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss above gradient norm, a column for each training stage; `metrics` are the rows of each run."""
    rows = [row for found in metrics.values() for row in found if "loss" in row]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = _grid(2, max(len(stages), 1), 3.6, 2.5, sharex="col")
    for column, stage in enumerate(stages):
        for line, (key, label) in enumerate((("loss", "loss"), ("grad_norm", "gradient norm"))):
            plot = axes[line][column]
            for number, (name, found) in enumerate(metrics.items()):
                points = [(row["step"], row[key]) for row in found if row["stage"] == stage and key in row]
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
    """pass@k of every model of every run: {run: {model: points}}."""
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


def trace_number_curves(
    fewer: Mapping[str, Sequence[FewerTraces]], finals: Mapping[str, tuple[int, Accuracy]]
) -> Figure:
    """Against K: questions with a correct trace, effective sample size and, for runs of different K, final pass@1.

    Args:
        fewer: of each run with weights.
        finals: (K, pass@1 of the final policy) of each run that has one; drawn if there are two values of K.
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
    _label(plots[0], "", "K, traces a question", "questions with a correct trace")
    _label(plots[1], "", "K, traces a question", "mean effective sample size")
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
    """Two histograms in the plane: trace tokens x log-ratio, answer tokens x log-likelihood."""
    figure, (plots,) = _grid(1, 2, 4.8, 3.4)
    labels = (("tokens of the trace", ratio_label), ("tokens of the reference answer", "log π(y′ | x, z)"))
    for plot, (tokens, values), (across, up) in zip(plots, (ratios, likelihoods), labels, strict=True):
        _label(plot, "", across, up)
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
    """Edges of at most 60 bins of equally many whole lengths, at least 10 lengths in all: one alone would fill all."""
    spare = max(_LEAST_LENGTHS - 1 - int(np.ptp(tokens)), 0)
    least = max(int(tokens.min()) - spare // 2, 0)
    most = max(int(tokens.max()), least + _LEAST_LENGTHS - 1)
    width = -(-(most - least + 1) // _MOST_LENGTH_BINS)
    return np.arange(least, most + width + 1, width, dtype=np.float64) - 0.5


def implied_weights(accuracies: Mapping[str, Floats]) -> Figure:
    """The weight each objective implies for a question of accuracy P, above where the questions at hand are.

    Args:
        accuracies: [questions] for each set of questions.
    """
    figure, axes = _grid(2, 1, 6.0, 2.4, sharex="col")
    above, below = axes[0][0], axes[1][0]
    grid = np.linspace(0.0, 1.0, 401)
    for number, (label, weight) in enumerate(IMPLIED_WEIGHTS.items()):
        # At P = 1 the last curve falls from its pole to 0: a line down would read as a slope.
        drawn = grid[1:-1]
        above.plot(
            drawn, [weight(float(p)) for p in drawn], color=_colour(number), linestyle=_LINES[number % 3], label=label
        )
    above.set_ylim(0, 4)
    above.legend(fontsize=8, loc="upper left")
    _label(above, "", "", "implied weight")
    bins = np.linspace(-0.025, 1.025, 22)
    for number, (label, found) in enumerate(accuracies.items()):
        shares = np.full(len(found), 1 / max(len(found), 1))
        below.hist(found, bins, weights=shares, color=_colour(number), alpha=0.45, label=label)
    below.margins(y=0.4)  # room for the legend
    below.legend(fontsize=8, loc="upper left")
    _label(below, "", "P, accuracy of a question", "share of questions")
    return figure


def size_histogram(sizes: Floats, num_traces: int) -> Figure:
    """Effective sample sizes of the questions; those without weights are the bar at 0."""
    figure, ((plot,),) = _grid(1, 1, 6.0, 2.8)
    plot.hist(sizes, np.arange(-0.125, num_traces + 0.26, 0.25), color=_colour(0))
    _label(plot, "", f"effective sample size of {num_traces} traces", "questions")
    return figure


def _grid(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, Any]:
    figure = Figure((width * columns, height * rows), dpi=160, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _label(plot: Axes, title: str, across: str, up: str) -> None:
    plot.set_title(title, fontsize=10)
    plot.set_xlabel(across)
    plot.set_ylabel(up)
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
