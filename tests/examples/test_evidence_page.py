"""The tables of docs/evidence.md are those of its results, and their arithmetic is right."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # where it looks for the rest of it, as a script
SPEC = importlib.util.spec_from_file_location("evidence_page", ROOT / "examples" / "evidence_page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)
RESULTS = ROOT / "docs" / "evidence" / "results.json"


def run(**correct):
    return {
        "correct": correct,
        "target_tokens": {"sft": 1000.0, "policy": 3000.0},
        "traces": {"round_01": {"tokens": 5000}},
        "rollouts": {"round_01": {"tokens": 2000}},
    }


RUNS = {
    "iwae": {"1": run(pi_0="0124", pi_1="4444"), "2": run(pi_0="0000", pi_1="0444")},
    "rft": {"1": run(pi_1="2244"), "3": run(pi_1="0000")},
}


def test_the_last_policy_of_a_run_counts():
    assert page.read_counts(RUNS, "iwae")["2"].tolist() == [0, 4, 4, 4]
    assert page.read_counts(RUNS, "pi_0")["1"].tolist() == [0, 1, 2, 4]
    assert page.read_counts(RUNS, "grpo") == {}


def test_intervals_are_of_the_mean_over_seeds_by_question():
    assert page.interval(np.full((3, 5), 0.25)) == (0.25, 0.25, 0.25)
    opposite = np.array([[0.0, 1.0] * 50, [1.0, 0.0] * 50])  # every question has the same mean over seeds
    assert page.interval(opposite) == (0.5, 0.5, 0.5)
    mean, low, high = page.interval(np.array([[0.0, 1.0] * 200]))
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_differences_are_of_the_seeds_that_both_have():
    assert page.difference(RUNS, "rft", page.pass_at_1).startswith(
        "-0.250 ["
    )  # seed 1: 1, 1, 1, 1 against 1/2, 1/2, 1, 1
    assert page.difference(RUNS, "iwae", page.pass_at_1) == ""


def test_questions_are_binned_by_the_first_policy_of_the_same_seed():
    found = page.by_difficulty({"iwae": {"1": run(pi_0="0123444" * 20 + "4", pi_1="0123400" * 20 + "4")}})["iwae"]
    assert found == [0.0, 0.25, 0.5, 0.75, pytest.approx((20 + 1) / 61)]
    (few,) = page.by_difficulty({"iwae": {"1": run(pi_0="0" * 20 + "1" * 19, pi_1="4" * 39)}}).values()
    assert few[0] == 1.0 and np.isnan(few[1:]).all()


def test_a_run_that_collapsed_is_told_by_its_rounds_and_has_no_last_policy():
    ended = run(pi_0="0000", pi_1="4400")
    drawn = {"traces": 100, "tokens": 700, "truncated": 99, "distinct": 50, "answers": 0, "correct_answers": 0}
    weigh = {"ess": 0.0, "kl_posterior_policy": 98.0}
    ended |= {"traces": {"round_01": drawn, "round_02": drawn}, "weigh": {"1": weigh, "2": {"ess": 0.0}}}
    results = {"iwae": RUNS["iwae"], "reverse_kl_rounds_3": {"1": ended}}
    assert page.read_counts(results, "reverse_kl_rounds_3") == {}
    first, second = page.rounds_table(results)[2:]
    assert first.startswith("| reverse KL | 1 | 1 | 0.500 [") and first.endswith("| 98.00 |")
    assert second == "| reverse KL | 2 | 1 | collapsed | 0.990 | 0.500 | 7.0 | 0.000 | 0.00 | – |"


def test_costs_are_of_all_stages_and_of_the_first_policy_alone():
    assert page.cost(RUNS, "iwae") == ["4 k", "7 k"]
    assert page.cost(RUNS, "pi_0") == ["1 k", "0 k"]


def test_the_document_has_the_tables_of_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence_page.py", "--results", str(RESULTS), "--figures", str(tmp_path)])
    page.main()
    document = (ROOT / "docs" / "evidence.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in document
    tasks = json.loads(RESULTS.read_text())
    drawn = [len(page.HARD_FIGURES if task in page.HARD_TITLES else page.FIGURES) for task in tasks]
    assert len(list(tmp_path.glob("*.png"))) == sum(drawn)
