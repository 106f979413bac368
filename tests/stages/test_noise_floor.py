"""What rounding moves weights by, from traces that were scored twice."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.small_run import make_run, round_records

from megavar.record_files import write_records
from megavar.records import Score
from megavar.report.figure_list import _noise_of_weights
from megavar.report.run_view import RunView
from megavar.report.summary import print_summary, summarize
from megavar.runs.metrics import Metrics
from megavar.stages import weigh

SHIFTS = (0.01, -0.02, 0.03, 0.0)
"""Nats a token that the second scoring of each trace of a question differs by, under the policy."""


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path)
    _, _, scores = round_records()
    again = [
        replace(score, logp_policy=score.logp_policy + np.float32(SHIFTS[score.trace_index]), num_answers=None,
                num_correct=None)
        for score in scores
        if score.question_id in ("easy", "mixed") and score.num_answers
    ]  # fmt: skip
    write_records(run.round / "scores" / "again.parquet", again, Score)
    return run


def weighed(run):
    weigh.execute(run, None)
    return [row for row in Metrics.read(run.folder) if row["stage"] == "weigh"][-1]


def test_noise_is_the_deviation_of_one_scoring(run):
    """Equation 8 by hand: d_k = 0.1 k in the first scoring and that plus the shift in the second, a_k from verdicts."""
    correct = {"easy": np.array([1, 1, 1, 1]), "mixed": np.array([0, 0.5, 1, 0])}
    ratios = 0.1 * np.arange(4)
    differences = []
    for accuracy in correct.values():
        first, second = (accuracy * np.exp(values) for values in (ratios, ratios + SHIFTS))
        differences.append(first / first.sum() - second / second.sum())
    found = weighed(run)
    assert found["weight_noise"] == pytest.approx(np.sqrt(np.mean(np.square(differences)) / 2), rel=1e-5)
    assert found["log_ratio_noise"] == pytest.approx(np.sqrt(np.mean(np.square(SHIFTS)) / 2), rel=1e-5)


def test_the_second_scores_change_no_weight(run):
    before = (run.round / "weights" / "data.parquet").read_bytes()
    weighed(run)
    assert (run.round / "weights" / "data.parquet").read_bytes() == before


def test_traces_beyond_those_that_are_weighed_do_not_count(run):
    run.config.objective.num_traces = 2
    assert weighed(run)["log_ratio_noise"] == pytest.approx(np.sqrt(np.mean(np.square(SHIFTS[:2])) / 2), rel=1e-5)


def test_equal_scores_have_no_noise(run):
    _, _, scores = round_records()
    write_records(run.round / "scores" / "again.parquet", scores[:4], Score)
    found = weighed(run)
    assert (found["log_ratio_noise"], found["weight_noise"]) == (0, 0)


def test_without_closed_traces_there_is_no_noise_to_show(run):
    (run.round / "scores" / "again.parquet").unlink()
    assert not {"log_ratio_noise", "weight_noise"} & weighed(run).keys()
    assert summarize(run)["weight_noise"] is None
    assert _noise_of_weights(RunView(run.folder, run.config)) == ""


def test_it_is_shown_beside_the_effective_sample_size(run, capsys):
    noise = weighed(run)["weight_noise"]
    print_summary(run)
    assert f"±{noise:.2g} of a weight" in capsys.readouterr().out
    assert f"moves a weight by {noise:.2g} " in _noise_of_weights(RunView(run.folder, run.config))
