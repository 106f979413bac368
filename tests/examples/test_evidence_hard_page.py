"""The tables of the hard tasks: pass@k by level, paired differences, intervals over seeds and questions, costs."""

import importlib.util
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = importlib.util.spec_from_file_location("evidence_hard_page", EXAMPLES / "evidence_hard_page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


def run(level_3, pi_0=None, sft=4e12, **flops):
    """A result: correct samples of the last policy on two questions of level 3; 64 of 64 at the other levels."""
    policies = [*(("pi_0", pi_0) for _ in "x" if pi_0 is not None), *(("pi_1", level_3) for _ in "x" if flops)]
    if not flops:
        policies = [("pi_0", level_3)]
    counts = {"eval_1": [64, 64], "eval_2": [64, 64]}
    return {
        "correct": {suite: {name: counts.get(suite, found) for name, found in policies} for suite in page.SUITES},
        "flops": {"sft": sft, **flops},
        "traces": {"round_01": {"answers": 8, "correct_answers": 2}} if flops else {},
        "weigh": {"1": {"ess": 4.0, "leakage": 1.5}} if flops else {},
    }


RESULTS = {
    "iwae": {
        "1": run([32, 0], [1, 0], posterior=1e12, sample=1e12, score=1e12, policy=3e12),
        "2": run([64, 64], [0, 0], posterior=1e12, sample=1e12, score=1e12, policy=3e12),
    },
    "rft": {"1": run([32, 32], sample=2e12, policy=4e12)},
    "more_sft": {"1": run([16, 0], sft=10e12)},
}


def test_rates_are_of_the_last_policy_and_pi_0_is_that_of_iwae():
    assert page.rates(RESULTS, "iwae", "eval_3", 1).tolist() == [[0.5, 0.0], [1.0, 1.0]]
    assert page.rates(RESULTS, "pi_0", "eval_3", 64).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert page.rates(RESULTS, "more_sft", "eval_3", 1).tolist() == [[0.25, 0.0]]
    assert page.rates(RESULTS, "grpo", "eval_3", 1).size == 0
    draws = [any(index < 1 for index in chosen) for chosen in combinations(range(64), 3)]
    assert page.rates(RESULTS, "pi_0", "eval_3", 3)[0, 0] == pytest.approx(np.mean(draws))


def test_differences_are_of_the_seeds_that_both_have():
    mean, low, high = page.difference(RESULTS, "rft", "eval_3", 1)
    assert mean == 0.25 and (low, high) == (0.0, 0.5)


def test_intervals_hold_the_variation_of_seeds_and_of_questions():
    random = np.random.default_rng(1)
    both = 0.3 * random.standard_normal((5, 1)) + random.standard_normal((5, 40))
    _, low, high = page.interval(both)
    _, one_low, one_high = page.interval(both - both.mean(1, keepdims=True))
    seeds = both.mean(1).std() / np.sqrt(5)
    assert 3.0 < (one_high - one_low) / (both.std(1).mean() / np.sqrt(200)) < 4.8  # 2 x 1.96
    assert (high - low) > 3.0 * seeds and (high - low) > one_high - one_low
    assert page.interval(np.full((3, 5), 0.25)) == (0.25, 0.25, 0.25)


def test_tables_have_a_row_for_each_method_with_results():
    levels, costs = page.level_table(RESULTS), page.compute_table(RESULTS)
    assert [row.split(" | ")[0][2:] for row in levels[2:]] == [
        page.HARD_NAMES[method] for method in ("pi_0", "more_sft", "rft", "iwae")
    ]
    assert "| 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | 0.500 [0.500, 0.500] | +0.250" in levels[4]
    by_name = {row.split(" | ")[0][2:]: row.split(" | ")[1:] for row in costs[2:]}
    assert by_name[page.HARD_NAMES["iwae"]] == ["1.0", "1.0", "1.0", "3.0", "6.0", "1.00", "0.250", "4.0", "1.50 |"]
    assert by_name[page.HARD_NAMES["rft"]][:6] == ["0.0", "2.0", "0.0", "4.0", "6.0", "1.00"]
    assert by_name[page.HARD_NAMES["more_sft"]][4:6] == ["6.0", "1.00"]  # beyond the 4 of pi_0
    page.draw_pass_at_k(RESULTS)
