"""A look at the values of two expressions beside math-verify's, which rounds to six places."""

from collections.abc import Sequence
from typing import Any

from megavar.verifiers.plain_number import RELATIVE_ERROR

DIGITS = 40
"""Of evaluations; numbers that agree in half of them are the same."""


def differ(known: Any, answer: Any) -> bool:
    """Whether two sympy expressions are certainly not the same; False where that cannot be told."""
    from sympy import Expr, FiniteSet, Interval, MatrixBase, Tuple, Union

    known, answer = _value(known), _value(answer)
    if isinstance(known, Interval) and isinstance(answer, Interval):
        return differ(known.start, answer.start) or differ(known.end, answer.end)
    if isinstance(known, Tuple) and isinstance(answer, Tuple):
        return len(known) != len(answer) or any(map(differ, known, answer))
    if isinstance(known, MatrixBase) and isinstance(answer, MatrixBase):
        return known.shape != answer.shape or any(map(differ, known.flat(), answer.flat()))
    if isinstance(known, FiniteSet | Union) and isinstance(answer, FiniteSet | Union):
        return not _match(list(known.args), list(answer.args))
    if isinstance(known, Expr) and isinstance(answer, Expr):
        return _values_differ(known, answer)
    return False


def _value(expression: Any) -> Any:
    """The right-hand side of x = value."""
    from sympy import Eq, Symbol

    return expression.rhs if isinstance(expression, Eq) and isinstance(expression.lhs, Symbol) else expression


def _match(known: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Whether each element of one collection has its own equal in the other."""
    left = list(answer)
    for element in known:
        index = next((index for index, other in enumerate(left) if not differ(element, other)), None)
        if index is None:
            return False
        del left[index]
    return not left


def _values_differ(known: Any, answer: Any) -> bool:
    from sympy import Float, Rational

    names = sorted(known.free_symbols | answer.free_symbols, key=str)
    tolerance = float(RELATIVE_ERROR) if known.has(Float) or answer.has(Float) else 10.0 ** -(DIGITS // 2)
    for point in (Rational(10, 7), Rational(29, 11)):
        place = {name: point + Rational(index, 13) for index, name in enumerate(names)}
        try:
            one, other = (expression.subs(place).doit().evalf(DIGITS) for expression in (known, answer))
            if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
                return False
            size = max(abs(one), abs(other))
            if size and abs(one - other) > tolerance * size:
                return True
        except Exception:  # whatever an expression may raise when it is evaluated at a point
            return False
        if not names:
            break
    return False
