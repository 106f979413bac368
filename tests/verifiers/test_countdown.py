"""Verdicts on expressions that have to make a number."""

import json
from itertools import permutations, product

import pytest

from megavar.verifiers import get_verifier

NUMBERS = '{"target": 98, "nums": [44, 19, 35]}'
TABLE = [
    ("\\boxed{44+19+35}", NUMBERS, "correct"),
    ("<answer>44 + 19 + 35</answer>", NUMBERS, "correct"),
    ("<answer>44 + 19 + 35 = 98</answer>", NUMBERS, "correct"),
    ("\\boxed{44+19+35=97}", NUMBERS, "wrong"),
    ("\\boxed{98}", NUMBERS, "wrong"),
    ("\\boxed{44+44+10}", NUMBERS, "wrong"),
    ("\\boxed{(44+19)+35}", NUMBERS, "correct"),
    ("\\boxed{44 \\times 2 + 10}", NUMBERS, "wrong"),
    ("Answer: 44 + 19 + 35", NUMBERS, "correct"),
    ("nothing", NUMBERS, "no_answer"),
    ("\\boxed{__import__('os')}", NUMBERS, "wrong"),
    ("\\boxed{44**19}", NUMBERS, "wrong"),
    ("\\boxed{1/0}", '{"target": 1, "nums": [1, 0]}', "wrong"),
    ("\\boxed{\\frac{6}{3}\\times 2}", '{"target": 4, "nums": [6, 3, 2]}', "correct"),
    ("\\boxed{6 \u00f7 3 \u00d7 2}", '{"target": 4, "nums": [6, 3, 2]}', "correct"),
    ("\\boxed{8/(3-8/3)}", '{"target": 24, "nums": [8, 3, 8, 3]}', "correct"),
    ("\\boxed{8/(3-8/3)}", '{"target": 24, "nums": [8, 3, 3]}', "wrong"),
    (
        "\\boxed{((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((1}",
        NUMBERS,
        "wrong",
    ),
    ("\\boxed{44+19+35+0}", NUMBERS, "wrong"),
    ("\\boxed{4419+35}", NUMBERS, "wrong"),
    ("\\boxed{1e2}", NUMBERS, "wrong"),
    ("\\boxed{--44+19+35}", NUMBERS, "correct"),
]


@pytest.mark.parametrize(("response", "gold", "verdict"), TABLE)
def test_verdicts(response, gold, verdict):
    assert get_verifier("countdown")(response, gold) == verdict


def test_values_are_those_of_python():
    """Every expression of three numbers and two signs, with and without parentheses."""
    for (a, b, c), (one, two) in product(permutations((7, 3, 2)), product("+-*/", repeat=2)):
        for text in (f"{a}{one}{b}{two}{c}", f"({a}{one}{b}){two}{c}", f"{a}{one}({b}{two}{c})"):
            value = eval(text)
            if value == int(value):
                gold = json.dumps({"target": int(value), "nums": [2, 3, 7]})
                assert get_verifier("countdown")(f"\\boxed{{{text}}}", gold) == "correct", text
            gold = json.dumps({"target": int(value) + 1, "nums": [2, 3, 7]})
            assert get_verifier("countdown")(f"\\boxed{{{text}}}", gold) == "wrong", text


@pytest.mark.parametrize(
    "gold",
    [
        "98",
        "",
        '{"target": 98}',
        '{"target": "98", "nums": [1]}',
        '{"target": 98, "nums": [1.5]}',
        '{"target": 98, "nums": []}',
    ],
)
def test_a_task_that_cannot_be_read_is_an_error(gold):
    with pytest.raises(ValueError, match=r"ground-truth answer .*expected"):
        get_verifier("countdown")("\\boxed{98}", gold)
