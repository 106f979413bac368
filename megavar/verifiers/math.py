"""Verifier `math`: mathematical equivalence of the final answer, by math-verify."""

import logging
import re

from megavar.records import Verdict

_BOX = re.compile(r"\\boxed\s*\{")
# An escaped character (\{ and \} do not open or close a group), or a brace of a group.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


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
    boxed = last_box(response)
    # math-verify would parse several boxes as a set.
    parsed = parse(response if boxed is None else _as_box(boxed), parsing_timeout=None)
    if not parsed:
        return Verdict.NO_ANSWER
    gold_box = last_box(gold)
    expected = parse(_as_box(gold if gold_box is None else gold_box), parsing_timeout=None)
    if not expected:
        raise ValueError(f"the ground-truth answer {gold!r} is not a mathematical expression")
    # Asymmetric: math-verify expects the ground truth first.
    return Verdict.CORRECT if equal(expected, parsed, timeout_seconds=None) else Verdict.WRONG


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces, or None if there is none."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[box.end() : brace.start()]
    return None


def _as_box(expression: str) -> str:
    return f"\\boxed{{{expression}}}"
