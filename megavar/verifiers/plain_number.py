"""Plain numbers: integers, fractions, decimals and scientific notation, compared without a parser for mathematics."""

import re
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_ERROR = Fraction(5, 10**6)
"""Of a decimal: six significant digits."""
_ROUNDING = Fraction(1, 10**12)
"""Of float arithmetic."""
MAX_EXPONENT = 5000
_DIGITS = r"(?P<digits>\d+(?:\.\d*)?)(?:\\overline\s*\{(?P<repeated>\d+)\})?"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    rf"(?:{_DIGITS})?(?:(?:\s*(?:\\times|\\cdot|\*)\s*|\s+|(?<![\d.}}]))(?P<power>10\s*\^\s*\{{?\s*(?P<exponent>[-+]?\d+)\s*\}}?))?"
    r"|(?P<whole>\d+)?\s*\\frac\s*\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?:(?P<mixed>\d+)\s+)?(?P<left>\d+)\s*/\s*(?P<right>\d+)"
    r")\s*(?P<percent>\\?%|percent)?"
)


@dataclass(frozen=True)
class PlainNumber:
    """A number as it was written."""

    value: Fraction
    unit_in_last_place: Fraction = Fraction(0)
    """Of a decimal; 0 for an exact number."""
    is_percentage: bool = False


def plain_number(text: str) -> PlainNumber | None:
    """The number that a normalised answer consists of; None if it is anything else, or too large to compute."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or len(text) > 2 * MAX_EXPONENT:
        return None
    part = match.groupdict()
    sign, percent = -1 if part["sign"] == "-" else 1, part["percent"] is not None
    if part["top"] or part["left"]:
        top, bottom = int(part["top"] or part["left"]), int(part["bottom"] or part["right"])
        whole = part["whole"] or part["mixed"]
        if bottom == 0 or (whole and top < 0):
            return None
        return PlainNumber(sign * (int(whole or 0) + Fraction(top, bottom)), is_percentage=percent)
    if not part["digits"] and not part["power"]:
        return None
    if part["power"] and part["digits"] and part["digits"].endswith("."):
        return None
    exponent = int(part["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    whole, _, decimals = (part["digits"] or "1").partition(".")
    scale = Fraction(10) ** (exponent - len(decimals))
    value = int(whole + decimals) * scale
    if repeated := part["repeated"]:
        if "." not in (part["digits"] or ""):
            return None
        return PlainNumber(sign * (value + scale * Fraction(int(repeated), 10 ** len(repeated) - 1)))
    return PlainNumber(sign * value, scale if decimals else Fraction(0), percent)


def equal_numbers(one: PlainNumber, other: PlainNumber) -> bool:
    """Whether two numbers are the same: exact ones exactly, decimals to six significant digits and the last one given.

    That may differ by one between two decimals.

    A percentage equals the number with or without its sign: 50% is 50 and 0.5.
    """
    if one.is_percentage != other.is_percentage:
        percentage, number = (one, other) if one.is_percentage else (other, one)
        last_place = percentage.unit_in_last_place / 100
        plain = PlainNumber(percentage.value, percentage.unit_in_last_place)
        return _equal(plain, number) or _equal(PlainNumber(percentage.value / 100, last_place), number)
    return _equal(one, other)


def _equal(one: PlainNumber, other: PlainNumber) -> bool:
    if one.value == other.value:
        return True
    last_place = max(one.unit_in_last_place, other.unit_in_last_place)
    if not last_place or not one.value or not other.value:
        return False
    difference, size = abs(one.value - other.value), max(abs(one.value), abs(other.value))
    if difference <= _ROUNDING * size:
        return True
    both_rounded = one.unit_in_last_place and other.unit_in_last_place
    in_last_place = difference <= last_place if both_rounded else difference < last_place
    return in_last_place and difference <= RELATIVE_ERROR * size
