"""Countdown: a target to be made of numbers. Only these are published; an expression is found by trying all of them."""

import json
from fractions import Fraction

from megavar.data.importers.files import Row
from megavar.data.importers.layout import Draft, Layout, LeftOut, Reason, Response, columns

MOST_NUMBERS = 6
"""More take minutes to try."""


def countdown(row: Row) -> Draft:
    """The task in words, with its first expression as the solution."""
    target, numbers = int(row["target"]), [int(number) for number in row["nums"]]
    if len(numbers) > MOST_NUMBERS:
        raise LeftOut(Reason.UNREADABLE_ROW)
    found = _expression([(Fraction(number), str(number)) for number in numbers], Fraction(target))
    if found is None:
        raise LeftOut(Reason.NO_ANSWER)
    listed = ", ".join(map(str, numbers))
    return Draft(
        f"Make {target} from the numbers {listed} with +, -, *, / and parentheses, each number at most once.",
        json.dumps({"target": target, "nums": numbers}),
        responses=(Response(None, f"$\\boxed{{{found}}}$"),),
        verifier="countdown",
    )


def _expression(terms: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    """An expression of some of the terms (value, text) with the value of the target; None if there is none."""
    for value, text in terms:
        if value == target:
            return text
    for first in range(len(terms)):
        for second in range(first):
            rest = [term for place, term in enumerate(terms) if place not in (first, second)]
            for joined in _joined(terms[first], terms[second]):
                if (found := _expression([*rest, joined], target)) is not None:
                    return found
    return None


def _joined(one: tuple[Fraction, str], other: tuple[Fraction, str]) -> list[tuple[Fraction, str]]:
    (a, x), (b, y) = sorted((one, other), reverse=True)
    results = [(a + b, f"({x}+{y})"), (a * b, f"({x}*{y})"), (a - b, f"({x}-{y})")]
    if b:
        results.append((a / b, f"({x}/{y})"))
    if a and a != b:
        results.append((b / a, f"({y}/{x})"))
    return results


LAYOUTS = (
    Layout(
        ("countdown",),
        columns("target, nums"),
        countdown,
        columns("data_source, prompt, ability, reward_model, extra_info"),
    ),
)
