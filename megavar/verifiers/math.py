"""Mathematical equality of the final answer, by math-verify."""

import logging
import re

from megavar.records import Verdict

_BOX = re.compile(r"\\boxed\s*\{")
# An escaped character (so that \{ and \} of a set are no group), or a brace of a group.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def verify(response: str, gold: str) -> Verdict:
    """Compare the response's last boxed expression (or, without a box, what math-verify finds) with `gold`.

    Args:
        gold: the known answer, as an expression or already as \\boxed{expression}.

    Raises:
        ValueError: if `gold` holds nothing that math-verify can read.
    """
    from math_verify import parse
    from math_verify import verify as equal

    # It warns in every process that its time-outs are off. They are, because they need the main thread's SIGALRM: the
    # process around this call has the deadline.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    boxed = last_box(response)
    # Several boxes would be read as a set.
    found = parse(response if boxed is None else _as_box(boxed), parsing_timeout=None)
    if not found:
        return Verdict.NO_ANSWER
    known = last_box(gold)
    expected = parse(_as_box(gold if known is None else known), parsing_timeout=None)
    if not expected:
        raise ValueError(f"the known answer {gold!r} is no mathematical expression")
    # Asymmetric: the known answer is first.
    return Verdict.CORRECT if equal(expected, found, timeout_seconds=None) else Verdict.WRONG


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces, or None."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[box.end() : brace.start()]
    return None


def _as_box(expression: str) -> str:
    return f"\\boxed{{{expression}}}"
