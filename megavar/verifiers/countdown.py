"""Verifier `countdown`: an expression that makes the target from the given numbers, each used at most once."""

import json
import re
from collections import Counter
from fractions import Fraction

from megavar.records import Verdict
from megavar.verifiers.final_answer import last_box, stated_answer
from megavar.verifiers.notation import normalise

MAX_CHARACTERS, MAX_DEPTH = 500, 30
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_TOKEN = re.compile(r"\s*(\d{1,12}|[-+*/()])")


def verify(response: str, gold: str) -> Verdict:
    """Compute the expression of the last \\boxed{...}, of <answer>...</answer> or of the sentence that states it.

    Args:
        gold: `{"target": 98, "nums": [44, 19, 35]}`.

    Raises:
        ValueError: if `gold` is anything else.
    """
    target, numbers = _read_task(gold)
    answer = last_box(response)
    if answer is None:
        tagged = _TAGGED.findall(response)
        answer = tagged[-1] if tagged else stated_answer(response)
    if answer is None or not answer.strip():
        return Verdict.NO_ANSWER
    if len(answer) > MAX_CHARACTERS:
        return Verdict.WRONG
    text = _arithmetic(answer)
    try:
        sides = [_Parser(side).parse() for side in text.split("=")]
    except (_NoExpression, ZeroDivisionError):
        return Verdict.WRONG
    # The target may stand on either side; one of the sides must be made of the numbers.
    right = all(value == target for value, _ in sides) and any(used <= numbers for _, used in sides)
    return Verdict.CORRECT if right else Verdict.WRONG


def _read_task(gold: str) -> tuple[int, Counter[int]]:
    expected = 'expected {"target": integer, "nums": [integers]}'
    try:
        task = json.loads(gold)
        target, numbers = task["target"], task["nums"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"the ground-truth answer {gold!r:.200} cannot be read; {expected}") from error
    if type(target) is not int or not isinstance(numbers, list) or not numbers:
        raise ValueError(f"the ground-truth answer {gold!r:.200} has no target or no numbers; {expected}")
    if any(type(number) is not int for number in numbers):
        raise ValueError(f"the ground-truth answer {gold!r:.200} has numbers that are no integers; {expected}")
    return target, Counter(numbers)


def _arithmetic(answer: str) -> str:
    """An answer with the signs + - * / and parentheses only, where it was written in LaTeX."""
    text = normalise(answer)
    for _ in range(MAX_DEPTH):
        text, count = re.subn(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        if not count:
            break
    text = re.sub(r"\\(?:times|cdot|ast)(?![A-Za-z])|(?<=[\d)\s])x(?=[\d(\s])", "*", text)
    text = re.sub(r"\\div(?![A-Za-z])|:", "/", text)
    return text.translate(str.maketrans("[]{}", "()()"))


class _NoExpression(Exception):
    """The text is no arithmetic expression."""


class _Parser:
    """Computes +, -, * and / of integers exactly."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        position, text = 0, text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _NoExpression
            self._tokens.append(match[1])
            position = match.end()
        self._tokens.reverse()  # the next one is the last
        self._used: Counter[int] = Counter()

    def parse(self) -> tuple[Fraction, Counter[int]]:
        """The value, and how often each number is used."""
        value = self._sum(0)
        if self._tokens:
            raise _NoExpression
        return value, self._used

    def _next(self, *allowed: str) -> str | None:
        if self._tokens and (self._tokens[-1] in allowed or (not allowed and self._tokens[-1].isdigit())):
            return self._tokens.pop()
        return None

    def _sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while sign := self._next("+", "-"):
            term = self._product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._factor(depth)
        while sign := self._next("*", "/"):
            factor = self._factor(depth)
            value = value * factor if sign == "*" else value / factor
        return value

    def _factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise _NoExpression
        if self._next("-"):
            return -self._factor(depth + 1)
        if self._next("("):
            value = self._sum(depth + 1)
            if not self._next(")"):
                raise _NoExpression
            return value
        number = self._next()
        if number is None:
            raise _NoExpression
        self._used[int(number)] += 1
        return Fraction(int(number))
