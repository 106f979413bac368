"""Intervals cover what they are about as often as they say, and differences of models are paired."""

import numpy as np
import pytest

from megavar.evaluation.estimates import estimate
from megavar.evaluation.results import Outcomes, Results, compare, read_results, write_results

NUM_TRIALS = 1000


def accuracies(random, num_questions, num_samples, shift=0.0):
    """[Q] shares of correct samples of questions drawn from a population of hard and easy ones, whose mean is 0.4."""
    difficulty = random.beta(0.6, 0.9, num_questions)
    return random.binomial(num_samples, difficulty * (1 - shift)) / num_samples


@pytest.mark.parametrize(("num_questions", "least"), [(30, 0.91), (200, 0.93)])
def test_the_interval_holds_the_mean_of_all_questions_about_95_times_in_100(num_questions, least):
    """In 1,000 trials (standard error 0.7 points); few questions are covered less, as the page says."""
    random = np.random.default_rng(0)
    found = [estimate(accuracies(random, num_questions, 16), 400, trial) for trial in range(NUM_TRIALS)]
    assert least <= np.mean([row.low <= 0.4 <= row.high for row in found]) <= 0.965


def test_the_interval_of_a_paired_difference_covers_and_is_narrower_than_that_of_two_suites():
    """The second model answers the same questions with 0.9 times the probability: the mean difference is -0.04."""
    random, covered, widths, unpaired = np.random.default_rng(1), 0, [], []
    for trial in range(NUM_TRIALS // 2):
        difficulty = random.beta(0.6, 0.9, 200)
        one, other = (random.binomial(16, difficulty * factor) / 16 for factor in (1.0, 0.9))
        paired = estimate(other - one, 400, trial)
        covered += paired.low <= -0.04 <= paired.high
        widths.append(paired.high - paired.low)
        unpaired.append(
            np.hypot(*(row.high - row.low for row in (estimate(some, 400, trial) for some in (one, other))))
        )
    assert 0.92 <= covered / (NUM_TRIALS // 2) <= 0.975
    assert np.mean(widths) < 0.4 * np.mean(unpaired)


def outcomes(*num_correct, majority=None, tokens=None):
    def array(values):
        return np.array(values, float)

    zeros = [0.0] * len(num_correct)
    return Outcomes(array(num_correct), array(majority or zeros), array(tokens or zeros), array(zeros))


def test_metrics_are_means_over_the_questions_and_differences_those_of_the_questions():
    one = outcomes(4, 2, 0, majority=[1, 0.5, 0], tokens=[10, 20, 60])
    other = outcomes(3, 3, 1, majority=[1, 1, 0], tokens=[10, 10, 10])
    found = compare("f.jsonl", {"one": one, "other": other}, 4, [1, 2, 4], 200, 0)
    assert found.questions == 3
    means = {metric: row.mean for metric, row in found.models["one"].items()}
    # Of the 6 pairs of 4 samples with 2 correct ones, 1 has none of these.
    expected = {"avg@4": 0.5, "pass@1": 0.5, "pass@2": (1 + 5 / 6) / 3, "pass@4": 2 / 3, "maj@4": 0.5, "tokens": 30}
    assert means == pytest.approx({**expected, "truncated": 0.0})
    (difference,) = found.differences
    assert (difference.model, difference.minus) == ("other", "one")
    values = difference.values["avg@4"]
    assert values == estimate(np.array([-0.25, 0.25, 0.25]), 200, 0) and values.mean == pytest.approx(1 / 12)


def test_a_model_compared_with_itself_differs_by_nothing():
    same = outcomes(4, 2, 0, 1)
    (difference,) = compare("f", {"a": same, "b": same}, 4, [4], 100, 0).differences
    assert all((row.mean, row.low, row.high) == (0, 0, 0) for row in difference.values.values())


def test_results_are_read_as_they_were_written_and_damage_is_named(tmp_path):
    suite = compare("f", {"a": outcomes(4, 2), "b": outcomes(1, 1)}, 4, [4], 100, 0)
    results, file = Results(4, 100, 0, {"a": "x/a", "b": "x/b"}, {"suite": suite}), tmp_path / "results.json"
    write_results(results, file)
    assert read_results(file) == results
    file.write_text(file.read_text().replace("questions", "question"))
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        read_results(file)
