"""The math verifier's verdicts."""

import pytest

from megavar.verifiers import get_verifier
from megavar.verifiers.math import last_box

TABLE = [
    ("\n\\boxed{7}", "7", "correct"),
    ("\n\\boxed{8}", "7", "wrong"),
    ("first \\boxed{3}, no: \\boxed{7}", "7", "correct"),
    ("first \\boxed{7}, no: \\boxed{3}", "7", "wrong"),
    ("\\boxed{7}, that is \\boxed{8", "7", "correct"),
    ("\\boxed{7}, that is \\boxed{}", "7", "no_answer"),
    ("\\boxed {7}", "7", "correct"),
    ("\\boxed{7}", "\\boxed{7}", "correct"),
    ("\\boxed{\\frac{1}{2}}", "0.5", "correct"),
    ("\\boxed{\\dfrac{2}{4}}", "$\\frac{1}{2}$", "correct"),
    ("\\boxed{-\\frac{3}{4}}", "-0.75", "correct"),
    ("\\boxed{0.333}", "\\frac{1}{3}", "wrong"),
    ("\\boxed{-3}", "-3", "correct"),
    ("\\boxed{3}", "-3", "wrong"),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
    ("\\boxed{x^2+2x}", "(x+1)^2", "wrong"),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", "correct"),
    ("\\boxed{1,234}", "1234", "correct"),
    ("\\boxed{3\\times 10^2}", "300", "correct"),
    ("\\boxed{5\\text{ cm}}", "5", "correct"),
    ("\\boxed{50\\%}", "50", "correct"),
    ("\\boxed{90^\\circ}", "90", "correct"),
    ("\\boxed{x=5}", "5", "correct"),
    ("\\boxed{\\text{(B)}}", "B", "correct"),
    ("\\boxed{A}", "B", "wrong"),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", "correct"),
    ("\\boxed{(1,2)}", "(2,1)", "wrong"),
    ("\\boxed{[0,1]}", "[0,1)", "wrong"),
    ("\\boxed{(1,\\infty)}", "x>1", "correct"),
    ("\\boxed{x>1}", "(1,\\infty)", "correct"),
    ("\\boxed{x\\geq 1}", "(1,\\infty)", "wrong"),
    ("the answer is $5$.", "5", "correct"),
    ("", "5", "no_answer"),
    ("", "", "no_answer"),
    ("\\boxed{}", "", "no_answer"),
    ("\\boxed{}", "5", "no_answer"),
    ("7, so \\boxed{ }", "7", "no_answer"),
    ("I do not know.", "5", "no_answer"),
]


@pytest.mark.parametrize(("response", "gold", "verdict"), TABLE)
def test_verdicts(response, gold, verdict):
    assert get_verifier("math")(response, gold) == verdict


def test_an_answer_against_an_empty_known_one_is_an_error_not_a_verdict():
    with pytest.raises(ValueError, match="the ground-truth answer '' is not a mathematical expression"):
        get_verifier("math")("\\boxed{7}", "")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{a} \\boxed{\\frac{1}{2}} end", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ 1, 2 \\right.} then {x}", "\\left\\{ 1, 2 \\right."),
        ("\\boxed{1 \\\\} {x}", "1 \\\\"),
        ("\\boxed{a} \\boxed{open", "a"),
        ("\\boxed{open", None),
        ("{7}", None),
    ],
)
def test_last_box_balances_braces(text, content):
    assert last_box(text) == content


def test_an_unknown_verifier_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'nope'.*math"):
        get_verifier("nope")
