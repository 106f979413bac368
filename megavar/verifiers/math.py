"""Verifier `math`: mathematical equivalence of the final answer, by math-verify."""

import logging
import re
from collections.abc import Collection
from math import log10, prod

from megavar.records import Verdict

# An escaped character (\{ and \} do not open or close a group), the start of a box, or a brace of a group.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SPACE = r"(?:\s|\$|\\[(\[,;:! ]|\\(?:quad|qquad|displaystyle|left)\b)*"
_RELATION = re.compile(
    _SPACE
    + r"(\\(?:neg|lnot|not|neq|ne|leq|leqslant|le|geq|geqslant|ge|lt|gt|ll|gg|approx|sim|simeq|cong|equiv|propto|prec"
    r"|succ|preceq|succeq|pm|mp)(?![A-Za-z])|[<>\u2264\u2265\u2260\u2248\u00ac\u223c\u00b1])"
)
"""A relation or a negation before the answer, which math-verify overlooks."""

MAX_RESPONSE_CHARACTERS = 20_000
"""Of the end of a response, where its answer is."""
MAX_UNBOXED_CHARACTERS = 2000
"""The same if nothing in it is boxed: math-verify looks at all of it."""
_LIMITS = {
    "characters": 500, "depth": 30, "digits": 100, "exponent": 1000, "exponents_nested": 2,
    "product_of_exponents": 10_000, "factorial": 2000, "bound": 1000, "binomial": 10_000, "cells": 100, "integrals": 2,
}  # fmt: skip
"""Beyond these (and beyond those of the known answer) computing takes minutes: `wrong` without parsing."""
_OF_COMPUTING = _LIMITS.keys() - {"characters", "depth", "digits"}
_NUMBER = r"\s*\{?\s*[-+]?\s*(\d[\d,]*)"


def verify(response: str, gold: str) -> Verdict:
    """Compare the last \\boxed{...} of the response with `gold`; without a box, the answer that math-verify extracts.

    Args:
        gold: the ground-truth answer: an expression, or \\boxed{expression}.

    Raises:
        ValueError: if math-verify cannot parse `gold`.
    """
    from math_verify import parse
    from math_verify import verify as equal

    # math-verify's timeouts use SIGALRM, which works in the main thread only (math_verify/utils.py, timeout), so they
    # are off, and it logs a warning in every process. The worker process enforces the deadline instead (pool.py).
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    response = response[-MAX_RESPONSE_CHARACTERS:]
    boxed, gold_box = last_box(response), last_box(gold)
    known = gold if gold_box is None else gold_box
    if boxed is None:
        response = response[-MAX_UNBOXED_CHARACTERS:]
        if is_too_large(response, known, _OF_COMPUTING):
            return Verdict.WRONG
    else:
        if is_too_large(boxed) and boxed.strip() == known.strip():
            return Verdict.CORRECT
        if is_too_large(boxed, known):
            return Verdict.WRONG
        if (relation := _RELATION.match(boxed)) and relation.group(1) not in known:
            return Verdict.WRONG
    # math-verify would parse several boxes as a set.
    parsed = parse(response if boxed is None else _as_box(boxed), parsing_timeout=None)
    if not parsed:
        return Verdict.NO_ANSWER
    expected = parse(_as_box(known), parsing_timeout=None)
    if not expected:
        raise ValueError(f"the ground-truth answer {gold!r} is not a mathematical expression")
    # Asymmetric: math-verify expects the ground truth first.
    return Verdict.CORRECT if equal(expected, parsed, timeout_seconds=None) else Verdict.WRONG


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces, or None if there is none."""
    opened: list[re.Match[str]] = []
    start, content = -1, None
    for token in _TOKEN.finditer(text):
        if token.group()[-1] == "{" and len(token.group()) != 2:
            opened.append(token)
        elif token.group() == "}" and opened:
            box = opened.pop()
            if len(box.group()) > 1 and box.start() > start:
                start, content = box.start(), text[box.end() : token.start()]
    return content


def sizes(expression: str) -> dict[str, int]:
    """What makes a LaTeX expression long to parse or to compute, as `_LIMITS` names it; in linear time."""
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
    found["bound"] = max((10**9 if "^{10^" in part or "!" in part else max(_numbers(r"(\d+)", part), default=0)
                          for part in ranges), default=0)  # fmt: skip
    chosen = re.findall(r"\\[dt]?binom(?![A-Za-z])(.{0,60})|\\choose(.{0,30})", expression, re.DOTALL)
    found["binomial"] = max(
        (10**9 if "^" in "".join(pair) else max(_numbers(r"(\d+)", "".join(pair)), default=0) for pair in chosen),
        default=0,
    )
    found["cells"] = expression.count("&") + expression.count("\\\\")
    found["integrals"] = len(re.findall(r"\\i*int(?![A-Za-z])", expression))
    return found


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


def is_too_large(expression: str, gold: str = "", measures: Collection[str] = _LIMITS) -> bool:
    """Whether an expression is larger, in one of these respects, than the limits and twice the known answer."""
    of_gold = sizes(gold)
    return any(
        size > max(_LIMITS[name], 2 * of_gold[name]) for name, size in sizes(expression).items() if name in measures
    )


def _as_box(expression: str) -> str:
    return f"\\boxed{{{expression}}}"
