"""How large a LaTeX expression is, judged before it is parsed: some take minutes or all memory to compute."""

import re
from collections.abc import Collection
from math import log10, prod

LIMITS = {
    "characters": 500, "depth": 30, "digits": 100, "exponent": 1000, "exponents_nested": 2,
    "product_of_exponents": 10_000, "factorial": 2000, "bound": 1000, "binomial": 10_000, "cells": 100, "integrals": 2,
}  # fmt: skip
"""Beyond these, and beyond those of the known answer, an answer is `wrong` without parsing."""
ABSOLUTE_FACTOR = 10
"""Beyond that many times the limits, a known answer is compared as text."""
COMPUTING = LIMITS.keys() - {"characters", "depth", "digits"}
_NUMBER = r"\s*\{?\s*[-+]?\s*(\d[\d,]*)"


def sizes(expression: str) -> dict[str, int]:
    """What makes a LaTeX expression long to parse or to compute, as `LIMITS` names it; in linear time."""
    depth, exponents_nested = _depths(expression)
    found = {"characters": len(expression), "depth": depth}
    found["exponents_nested"] = max(exponents_nested, _chain(expression))
    found["digits"] = max(map(len, re.findall(r"\d+", expression)), default=0)
    exponents = _numbers(r"(?:\^|\*\*|\d[eE])" + _NUMBER, expression)
    for base, exponent in re.findall(r"\^\s*\{?\s*(\d+)\s*\^\s*\{?\s*(\d+)", expression):  # such as 9^{9^9}
        exponents.append(int(10 ** min(int(exponent[:6]) * log10(max(2, int(base[:12]))), 12.0)))
    found["exponent"] = max(exponents, default=0)
    bases = _numbers(r"[\d)}\]!]\s*(?:\^|\*\*)" + _NUMBER, expression)
    found["product_of_exponents"] = prod(min(number, 10**6) or 1 for number in bases[:50])
    found["factorial"] = max(_numbers(r"(\d+)\s*[)}]?\s*!", expression), default=0)
    if re.search(r"!\s*[)}\]]*\s*!", expression):
        found["factorial"] = 10**9
    ranges = re.findall(r"\\(?:sum|prod|lim|bigcup|bigcap)(?![A-Za-z])(.{0,60})", expression, re.DOTALL)
    found["bound"] = max(map(_bound, ranges), default=0)
    chosen = re.findall(r"\\[dt]?binom(?![A-Za-z])(.{0,60})|\\choose(.{0,30})", expression, re.DOTALL)
    found["binomial"] = max(
        (10**9 if "^" in "".join(pair) else max(_numbers(r"(\d+)", "".join(pair)), default=0) for pair in chosen),
        default=0,
    )
    found["cells"] = expression.count("&") + expression.count("\\\\")
    found["integrals"] = len(re.findall(r"\\i*int(?![A-Za-z])", expression))
    return found


def _bound(limits: str) -> int:
    """Largest number in the limits of a sum; a power of powers or a factorial counts as too many terms."""
    if re.search(r"\^\s*\{\s*\d+\s*\^|!", limits):
        return 10**9
    return max(_numbers(r"(\d+)", limits), default=0)


def _depths(expression: str) -> tuple[int, int]:
    """How deep brackets are nested, and how many of those around one place are exponents."""
    around, last = [0], ""
    deepest = exponents = 0
    for char in expression:
        if char in "{([":
            around.append(around[-1] + (last == "^"))
            deepest, exponents = max(deepest, len(around) - 1), max(exponents, around[-1])
        elif char in "})]" and len(around) > 1:
            around.pop()
        last = last if char.isspace() else char
    return deepest, exponents


def _chain(expression: str) -> int:
    """Length of the longest chain such as 2^3^4, less one."""
    chains = re.findall(r"(?:(?:\^|\*\*)\s*[\w.]+\s*){2,}", expression)
    return max((chain.count("^") + chain.count("**") for chain in chains), default=0)


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(digits[:12]) for digits in (match.replace(",", "") for match in re.findall(pattern, text)) if digits]


def is_too_large(expression: str, gold: str = "", measures: Collection[str] = LIMITS) -> bool:
    """Whether an expression is larger, in one of these respects, than the limits and twice the known answer."""
    of_gold = sizes(gold)
    return any(
        size > max(LIMITS[name], 2 * of_gold[name]) for name, size in sizes(expression).items() if name in measures
    )


def is_beyond_computing(expression: str) -> bool:
    """Whether computing an expression could take minutes, or all memory, whoever asks for it."""
    return any(size > ABSOLUTE_FACTOR * LIMITS[name] for name, size in sizes(expression).items() if name in COMPUTING)
