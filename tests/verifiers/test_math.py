"""The math verifier's verdicts."""

import pytest

from megavar.verifiers import get_verifier
from megavar.verifiers.math import last_box

TABLE = [
    ("\n\\boxed{7}", "7", "correct"),
    ("\n\\boxed{8}", "7", "wrong"),
    ("first \\boxed{3}, no: \\boxed{7}", "7", "correct"),
    ("first \\boxed{7}, no: \\boxed{3}", "7", "wrong"),
    ("\\boxed{\\frac{1}{2}}", "0.5", "correct"),
    ("\\boxed{\\dfrac{2}{4}}", "\\frac{1}{2}", "correct"),
    ("\\boxed{-3}", "-3", "correct"),
    ("\\boxed{3}", "-3", "wrong"),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
    ("\\boxed{x^2+2x}", "(x+1)^2", "wrong"),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", "correct"),
    ("\\boxed{1,234}", "1234", "correct"),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", "correct"),
    ("\\boxed{(1,2)}", "(2,1)", "wrong"),
    ("the answer is $5$.", "5", "correct"),
    ("", "5", "no_answer"),
    ("\\boxed{}", "5", "no_answer"),
    ("I do not know.", "5", "no_answer"),
]


@pytest.mark.parametrize(("response", "gold", "verdict"), TABLE)
def test_verdicts(response, gold, verdict):
    assert get_verifier("math")(response, gold) == verdict


def test_last_box_balances_braces():
    assert last_box("\\boxed{a} \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
    assert last_box("\\boxed{open") is None


def test_an_unknown_verifier_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'nope'.*math"):
        get_verifier("nope")
