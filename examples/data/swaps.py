"""Verifier of the task `sort`: sequences of swaps that do the same are equally right."""

from megavar.records import Verdict
from megavar.verifiers.final_answer import last_box


def same_permutation(response: str, gold: str) -> Verdict:
    """Compare the swaps in the last \\boxed{...} with known ones, `132`: as many, with the same effect on any digits.

    Raises:
        ValueError: if `gold` has other characters than the digits 1 to 9.
    """
    known = _effect(gold)
    if known is None:
        raise ValueError(f"the known answer {gold!r:.100} is not a sequence of places from 1 to 9")
    answer = last_box(response)
    if answer is None:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if len(answer) == len(gold) and _effect(answer) == known else Verdict.WRONG


def _effect(swaps: str) -> list[int] | None:
    """What swapping each place with the next one makes of 0 to 9; None if these are no places."""
    digits = list(range(10))
    for place in swaps:
        if place not in "123456789":
            return None
        index = int(place)
        digits[index - 1], digits[index] = digits[index], digits[index - 1]
    return digits
