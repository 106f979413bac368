"""What the figures hold, read back from their axes."""

import numpy as np
import pytest

from megavar.evaluation.estimates import Estimate
from megavar.evaluation.pass_at_k import Accuracy
from megavar.evaluation.results import Results, SuiteResults
from megavar.report import figures
from megavar.report.curves import FewerTraces, Leakages

POINTS = [Accuracy(1, 0.25, 0.2, 0.3), Accuracy(2, 0.5, 0.4, 0.6)]
FEWER = {"a": [FewerTraces(1, 0.4, 1.0), FewerTraces(2, 0.7, 1.5)]}


@pytest.mark.parametrize("lengths", [[5], [0, 1], [1, 2], [1, 70], [3, 64, 500], list(range(61))])
def test_every_length_is_in_the_middle_part_of_one_of_at_most_60_bins(lengths):
    edges = figures.length_bins(np.array(lengths, float))
    counts, _ = np.histogram(lengths, edges)
    assert counts.sum() == len(lengths) and edges[-1] - edges[0] >= 10 and len(edges) <= 61
    assert set(edges % 1) == {0.5} and len(set(np.diff(edges))) == 1


def test_a_lone_length_stands_in_the_middle():
    edges = figures.length_bins(np.array([20.0, 20.0]))
    assert edges[0] + 4 < 20 < edges[-1] - 4


def test_curves_hold_their_points_and_intervals_around_them():
    (plot,) = figures.pass_curves({"run": {"pi_0": POINTS, "final": POINTS}}).axes
    first, second = plot.get_lines()
    assert first.get_xydata().tolist() == [[1, 0.25], [2, 0.5]]
    assert (first.get_label(), second.get_label()) == ("run: pi_0", "run: final")
    assert first.get_linestyle() != second.get_linestyle() and first.get_color() == second.get_color()
    band = plot.collections[0].get_datalim(plot.transData)
    assert (band.ymin, band.ymax) == pytest.approx((0.2, 0.6))


def test_every_model_has_its_interval_in_the_row_of_each_suite():
    values = {metric: {model: Estimate(mean, mean - 0.1, mean + 0.2) for model, mean in (("a", 0.2), ("b", 0.5))}
              for metric in ("avg@4", "maj@4")}  # fmt: skip
    models = {model: {metric: row[model] for metric, row in values.items()} | {"tokens": Estimate(9, 8, 10)}
              for model in ("a", "b")}  # fmt: skip
    suites = {name: SuiteResults("f", 3, models, []) for name in ("one", "two", "three")}
    figure = figures.suite_intervals(Results(4, 100, 0, {"a": "a", "b": "b"}, suites))
    assert [plot.get_xlabel() for plot in figure.axes] == ["avg@4", "maj@4"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["one", "two", "three"]
    for plot in figure.axes:
        for points, mean in zip(plot.containers, (0.2, 0.5), strict=True):
            line, _, (bars,) = points
            assert line.get_xdata() == pytest.approx([mean] * 3)
            assert np.round(line.get_ydata()).tolist() == [0, 1, 2]
            ends = np.array([segment[:, 0] for segment in bars.get_segments()])
            assert ends == pytest.approx(np.array([[mean - 0.1, mean + 0.2]] * 3))


def test_final_accuracy_against_k_is_drawn_for_runs_of_several_k_only():
    same = {"a": (8, POINTS[0]), "b": (8, POINTS[1])}
    assert len(figures.trace_number_curves(FEWER, same).axes) == 2
    plots = figures.trace_number_curves(FEWER, {**same, "b": (4, POINTS[1])}).axes
    assert plots[0].get_lines()[0].get_xydata().tolist() == [[1, 0.4], [2, 0.7]]
    assert plots[1].get_lines()[0].get_xydata().tolist() == [[1, 1.0], [2, 1.5]]
    assert [plot.get_lines()[0].get_xydata().tolist() for plot in plots[2:]] == [[[8, 0.25]]]
    assert plots[2].get_lines()[3].get_xydata().tolist() == [[4, 0.5]]


def test_training_has_a_column_for_each_stage_and_a_line_for_each_run_that_has_it():
    rows = [{"stage": stage, "step": step, "loss": step, "grad_norm": 2 * step} for stage in "ab" for step in (1, 2)]
    weigh = {"stage": "weigh", "step": 1, "ess": 3.0}
    plots = figures.training_curves({"x": [*rows, weigh], "y": rows[:2]}).axes
    assert [plot.get_title() for plot in plots] == ["a", "b", "", ""]
    assert [len(plot.get_lines()) for plot in plots] == [2, 1, 2, 1]
    assert plots[3].get_lines()[0].get_xydata().tolist() == [[1, 2], [2, 4]]


def test_densities_count_every_finite_row_and_say_so_when_there_is_none():
    ratios = (np.array([3.0, 3.0, 4.0]), np.array([0.1, 0.1, -np.inf]))
    left, right, *_ = figures.densities(ratios, (np.zeros(0), np.zeros(0)), "log-ratio").axes
    assert np.nansum(left.collections[0].get_array().filled(0)) == 2
    assert [text.get_text() for text in right.texts] == ["no scored rows"]


def test_questions_without_weights_are_the_bar_at_zero():
    (plot,) = figures.ess_histogram(np.array([0.0, 0.0, 1.0, 4.0]), 4).axes
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in plot.patches if bar.get_height()}
    assert bars == {0.0: 2, 1.0: 1, 4.0: 1}


def test_leakage_is_drawn_for_all_traces_and_by_weight_and_without_what_nobody_knows():
    known = Leakages(0.5, np.array([0.0, 0.5, 1.0]), np.array([0.0, 4.0, 8.0]), np.array([0.0, 1.0, 3.0]))
    unknown = Leakages(0.5, np.array([0.5]), np.array([np.nan]), np.array([0.0]))
    left, right = figures.leakage_histograms({"q": known, "policy's rollouts": unknown}).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "q (50% say it)", "q, weighted", "policy's rollouts (50% say it)"
    ]  # fmt: skip
    filled = [bar.get_height() for bar in left.patches[:20]]
    assert (filled[0], filled[10], filled[19], sum(filled)) == pytest.approx((1 / 3, 1 / 3, 1 / 3, 1))
    bars, outline = right.patches[:40], right.patches[40]
    assert [bar.get_height() for bar in bars if bar.get_height()] == pytest.approx([1 / 3] * 3)
    assert len(right.patches) == 41 and bars[-1].get_x() + bars[-1].get_width() == 8.0
    heights = {height for _, height in outline.get_xy() if height}
    assert sorted(heights) == pytest.approx([0.25, 0.75])
