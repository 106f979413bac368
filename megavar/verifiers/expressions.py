"""Expressions: what needs a parser and sympy. Both are imported when the first is compared."""

import logging
import re
from fractions import Fraction
from typing import Any

from megavar.verifiers.plain_number import PlainNumber, equal_numbers, plain_number
from megavar.verifiers.second_look import DIGITS, differ

_NAME = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def equal_expressions(answer: str, known: str) -> bool:
    """Whether two normalised answers are equal, by math-verify and by their values.

    Raises:
        ValueError: if the known one cannot be parsed.
    """
    from math_verify import verify as equal
    from sympy import Basic, MatrixBase

    answer, known = _with_cases_apart(answer, known)
    expected = parse_answer(f"\\boxed{{{known}}}")
    if not expected:
        raise ValueError(f"the ground-truth answer {known!r} is not a mathematical expression")
    found = parse_answer(f"\\boxed{{{answer}}}")
    if not found:
        return False
    one, other = found[0], expected[0]
    if not (isinstance(one, Basic | MatrixBase) and isinstance(other, Basic | MatrixBase)):
        return bool(equal(expected, found, timeout_seconds=None))
    for written, expression in ((plain_number(answer), other), (plain_number(known), one)):
        if written and (verdict := _number_is(written, expression)) is not None:
            return verdict
    if _is_equation_for_value(one, other) or _is_equation_for_value(other, one):
        return False  # math-verify would take its right-hand side
    one, other = _sets(one, other)
    # Asymmetric: math-verify expects the ground truth first.
    return not differ(other, one) and bool(equal(other, one, timeout_seconds=None))


def _with_cases_apart(answer: str, known: str) -> tuple[str, str]:
    """Both with an index at capital letters that occur as small ones too: math-verify reads M and m as the same."""
    names = set(_NAME.findall(f"{answer} {known}"))
    clashing = {name for name in names if name.lstrip("\\")[0].isupper() and name.lower() in names}

    def apart(match: re.Match[str]) -> str:
        return f" {{{match[0].lower()}_{{99}}}} " if match[0] in clashing else match[0]

    return _NAME.sub(apart, answer), _NAME.sub(apart, known)


def parse_answer(text: str, boxed: bool = True) -> list[Any]:
    """What math-verify reads: an expression and its text, or a text alone."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # math-verify's timeouts use SIGALRM, which works in the main thread only (math_verify/utils.py, timeout), so they
    # are off, and it logs a warning in every process. The worker process enforces the deadline instead (pool.py).
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Units are compared before; math-verify would drop them, and letters that only look like units.
    notation = NormalizationConfig(units=not boxed, malformed_operators=True, nits=True)
    latex = LatexExtractionConfig(normalization_config=notation)
    found: list[Any] = parse(text, [latex, ExprExtractionConfig()], parsing_timeout=None)
    return found


def _number_is(written: PlainNumber, expression: Any) -> bool | None:
    """Whether an exact expression has the value of a number as written; None if it is not an exact real number."""
    from sympy import Expr, Float

    if not isinstance(expression, Expr) or expression.has(Float) or written.is_percentage:
        return None
    value = expression.doit() if expression.is_number else None
    if value is not None and value.is_Rational:
        return equal_numbers(PlainNumber(Fraction(int(value.p), int(value.q))), written)
    value = None if value is None else value.evalf(DIGITS)
    if value is None or not value.is_Float or not value.is_finite:
        return None
    close = plain_number(f"{value:.{DIGITS - 2}e}".replace("e", r"\times 10^{") + "}")
    if close is None:
        return None
    if not written.unit_in_last_place:  # such as 2 for the square root of 4
        return bool(abs(close.value - written.value) <= abs(written.value) / 10 ** (DIGITS - 5))
    return equal_numbers(PlainNumber(close.value), written)


def _is_equation_for_value(expression: Any, other: Any) -> bool:
    """Whether only one is an equation, and says more than the value of a name: 2x = 10, but not x = 5 or f(x) = 5."""
    from sympy import Eq, Symbol
    from sympy.core.function import AppliedUndef

    is_value = isinstance(expression, Eq) and isinstance(expression.lhs, Symbol | AppliedUndef)
    return isinstance(expression, Eq) and not is_value and not isinstance(other, Eq)


def _sets(one: Any, other: Any) -> tuple[Any, Any]:
    """Where one of two expressions is a set of numbers, the other as one too: m >= 2 as an interval."""
    from sympy import FiniteSet, Set

    def is_set(expression: Any) -> bool:
        return isinstance(expression, Set) and not isinstance(expression, FiniteSet)

    if is_set(one) != is_set(other):
        return (one, _as_set(other)) if is_set(one) else (_as_set(one), other)
    return one, other


def _as_set(expression: Any) -> Any:
    from sympy import FiniteSet, Union

    parts = expression.args if isinstance(expression, FiniteSet) else [expression]
    try:
        return Union(*(part.as_set() for part in parts))
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # no relation, or of several variables
        return expression
