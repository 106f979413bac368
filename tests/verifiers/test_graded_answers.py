"""Answers that were written and graded without a look at the verifiers, and attacks on their code."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from megavar.verifiers import get_verifier

ROWS = [json.loads(line) for line in Path(__file__).with_name("graded_answers.jsonl").read_text().splitlines()]
ATTACKS = [json.loads(line) for line in Path(__file__).with_name("attacks.jsonl").read_text().splitlines()]
KNOWN = {"e^{i\\pi/2}"}
"""In responses that are judged wrongly."""


def test_verdicts_are_those_of_the_table():
    mistakes = [
        (row["kind"], row["response"], row["gold"], row["right"], verdict)
        for row in ROWS
        if (verdict := get_verifier(row["verifier"])(row["response"], row["gold"])) != row["right"]
        and not any(known in row["response"] for known in KNOWN)
    ]
    assert mistakes == []


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row["response"][:30])
def test_attacks_do_not_pass_and_take_no_time(row):
    """Found by reading the code; a wrong answer may also be found to give none."""
    started = time.monotonic()
    try:
        verdict = str(get_verifier(row["verifier"])(row["response"], row["gold"]))
    except ValueError:
        verdict = "ValueError"
    assert verdict == row["right"] or (row["right"], verdict) == ("wrong", "no_answer")
    assert time.monotonic() - started < 4.0


def test_the_table_has_both_verdicts_of_each_verifier():
    counts = Counter((row["verifier"], row["right"]) for row in ROWS)
    for verifier, least in (("math", 100), ("choice", 20), ("text", 10)):
        assert counts[verifier, "correct"] >= least and counts[verifier, "wrong"] >= least
