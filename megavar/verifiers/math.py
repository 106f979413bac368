"""Mathematical equality of the final answer, by math-verify."""

from megavar.verifiers.base import Verdict

_BOX = "\\boxed{"


def verify(response: str, gold: str) -> Verdict:
    """Compare the response's last boxed expression (or, without a box, what math-verify finds) with `gold`."""
    from math_verify import parse
    from math_verify import verify as equal

    boxed = last_box(response)
    if boxed is not None and not boxed.strip():
        return "no_answer"
    # Several boxes would be read as a set; its own time-outs need the main thread's SIGALRM, so they are off: the
    # process around this call has the deadline.
    found = parse(response if boxed is None else f"{_BOX}{boxed}}}", parsing_timeout=None)
    expected = parse(f"{_BOX}{gold}}}", parsing_timeout=None)
    if not found:
        return "no_answer"
    if not expected:
        raise ValueError(f"the known answer {gold!r} is no mathematical expression")
    return "correct" if equal(expected, found, timeout_seconds=None) else "wrong"


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} with balanced braces, or None."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(_BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(_BOX) : end]
    return None
