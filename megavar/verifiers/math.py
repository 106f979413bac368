"""Verifier `math`: mathematical equivalence of the final answer, by math-verify."""

import logging
import re

from megavar.records import Verdict
from megavar.verifiers.expression_size import COMPUTING, is_too_large

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
        if is_too_large(response, known, COMPUTING):
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


def _as_box(expression: str) -> str:
    return f"\\boxed{{{expression}}}"
