"""Verifier `math`: mathematical equivalence of the final answer.

Both answers are brought into one notation (`notation.py`). Numbers, units, number bases, words and the order of
collections are compared here; everything else must be equal as an expression
(`expressions.py`).
"""

import re
from typing import Any

from megavar.records import Verdict
from megavar.verifiers import choice
from megavar.verifiers.expression_size import COMPUTING, is_beyond_computing, is_too_large
from megavar.verifiers.expressions import equal_expressions, parse_answer
from megavar.verifiers.final_answer import last_box, stated_answer
from megavar.verifiers.notation import normalise, words
from megavar.verifiers.overlooked import certainly_differ
from megavar.verifiers.plain_number import PlainNumber, equal_numbers, plain_number
from megavar.verifiers.units import is_unit_alone, split_unit

_RELATION = re.compile(
    r"(\\(?:neg|lnot|not|neq|ne|leq|geq|lt|gt|ll|gg|approx|sim|simeq|cong|equiv|propto|prec|succ|preceq|succeq|pm|mp)"
    r"(?![A-Za-z])|[<>~\u00ac])"
)
"""A relation or a negation before the answer, which math-verify overlooks."""
_QUANTIFIER = re.compile(r"\\(?:forall|exists|nexists)(?![A-Za-z])")
_NAMED = re.compile(r"((?:\\?[A-Za-z]+|[A-Za-z]\([A-Za-z]\))(?:_\w|_\{\w+\})?'?)\s*(?:=|\\in(?![A-Za-z]))\s*([^=]+)")
"""A variable with its value, or the set that it is in."""
_IN_BASE = re.compile(
    r"([-+]?(?=[A-Za-z]*\d)[0-9A-Za-z]+)\s*_\s*\{?\s*(\d{1,2})\s*\}?|([-+]?[0-9A-Za-z]+)\s*\(?\s*(?:in\s+)?base\s+(\d{1,2})\s*\)?"
)
_ENDS_IN_WORDS = re.compile(r"([^,;=]*[\d})%])\s+((?:[^\W\d_]|[\s.'()-])+)")
_SENTENCE = re.compile(r"(?:[^\W\d_]+\s+){1,6}(?:is|are|equals|be)\s+(.+)", re.IGNORECASE)
_MEANS_ANOTHER = re.compile(
    r"(?<![A-Za-z])(?:not|no|none|nor|never|neither|cannot|can't|isn't|aren't|false|wrong|incorrect|rejected|invalid|about"
    r"|approximately|roughly|around|nearly|almost|than|except|least|most|minimum|maximum|more|less|fewer|over|under|above"
    r"|below|up|between|or|and|plus|minus|times|twice|thrice|half|double|triple|squared|cubed|dozen|hundreds?|thousands?"
    r"|millions?|billions?|trillions?|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|percent|factorial|if|unless)(?![A-Za-z])",
    re.IGNORECASE,
)
"""Words that make another answer of a number."""
_HEDGED = re.compile(
    r"(?<![A-Za-z])(?:not|never|cannot|can't|isn't|about|approximately|roughly|around|nearly|almost|than|least|most|over|under"
    r"|above|below|between|or)\s+(?:be\s+|equal\s+(?:to\s+)?|equals?\s+)?[$\\({\s]*$",
    re.IGNORECASE,
)
"""The same before a number in a sentence."""
_SAME_TEXTS = {"dne": "does not exist", "no solutions": "no solution", "no real solutions": "no real solution"}
MOST_WORDS_DROPPED = 8

MAX_RESPONSE_CHARACTERS = 20_000
"""Of the end of a response, where its answer is."""
MAX_UNBOXED_CHARACTERS = 2000
"""The same if nothing in it is boxed: math-verify looks at all of it."""


def verify(response: str, gold: str) -> Verdict:
    """Compare the last \\boxed{...} of the response with `gold`; without a box, the answer that math-verify extracts.

    Args:
        gold: the ground-truth answer: an expression, a text, the letter of an option, or one of these in \\boxed{}.

    Raises:
        ValueError: if `gold` is no answer: empty, without letters and digits, or not to be parsed.
    """
    response, gold_box = response[-MAX_RESPONSE_CHARACTERS:], last_box(gold)
    known = gold if gold_box is None else gold_box
    if choice.is_option(known):
        return choice.verify(response, known)
    answer = last_box(response)
    if answer is None:
        answer = _unboxed(response[-MAX_UNBOXED_CHARACTERS:], known)
        if answer is None:
            return Verdict.NO_ANSWER
    if answer.strip() == known.strip() and _says_something(answer):
        return Verdict.CORRECT
    if is_too_large(answer, known):
        return Verdict.WRONG
    one, other = normalise(answer), normalise(known)
    if not one:
        return Verdict.NO_ANSWER
    if not _says_something(other):
        raise ValueError(f"the ground-truth answer {gold!r} is not a mathematical expression")
    if one == other:
        return Verdict.CORRECT
    return Verdict.WRONG if is_beyond_computing(known) or not _equal(one, other) else Verdict.CORRECT


def _says_something(answer: str) -> bool:
    return any(char.isalnum() for char in answer)


def _unboxed(response: str, known: str) -> str | None:
    if is_too_large(response, known, COMPUTING | {"depth"}):
        return "?"
    stated = stated_answer(response)
    if _is_text(normalise(known)):
        return stated
    if stated is not None:
        text = normalise(stated)
        if not words(text) or plain_number(split_unit(text)[0]):
            return stated
        response = stated
    texts = [found for found in parse_answer(response, boxed=False) if isinstance(found, str)]
    if not texts:
        return None
    before = response[: max(response.rfind(texts[-1]), 0)]
    return "?" if _HEDGED.search(before) else texts[-1]


def _equal(answer: str, known: str) -> bool:
    if _has_another_relation(answer, known):
        return False
    answer, known = (re.sub(r"^(?:\\approx|\\sim)(?![A-Za-z])\s*|^~\s*", "", text) for text in (answer, known))
    if _has_another_relation(known, answer):
        return False
    if len(_QUANTIFIER.findall(answer)) != len(_QUANTIFIER.findall(known)):
        return False
    if not _MEANS_ANOTHER.search(answer) and not _is_text(answer) and (sentence := _SENTENCE.fullmatch(answer)):
        answer = sentence[1]
    answer, known = _without_name(stated_answer(answer) or answer, known)
    if (verdict := _as_numbers(answer, known)) is not None:
        return verdict
    if (verdict := certainly_differ(answer, known)) is not None:
        return not verdict
    answer, known, ratio = _without_units(answer, known)
    if ratio is None:
        return False
    if ratio != 1:
        one, other = plain_number(answer), plain_number(known)
        scaled = one and PlainNumber(one.value * ratio, one.unit_in_last_place * ratio)
        return bool(scaled and other and equal_numbers(scaled, other))
    for compare in (_as_numbers, _in_bases, _as_texts):
        if (verdict := compare(answer, known)) is not None:
            return verdict
    answer, known = _without_words(answer, known)
    if words(answer) != words(known):
        return False
    return answer == known or _as_numbers(answer, known) or equal_expressions(answer, known)


def _has_another_relation(one: str, other: str) -> bool:
    """Whether one begins with a relation that the other lacks; plus-minus may stand for two values."""
    relation = _RELATION.match(one)
    return relation is not None and relation[1] not in other and not (relation[1] == "\\pm" and "," in other)


def _without_name(answer: str, known: str) -> tuple[str, str]:
    """Both without the `x =` or `x \\in` before them, unless these names differ."""
    one, other = _NAMED.fullmatch(answer), _NAMED.fullmatch(known)
    if (one and other and one[1] != other[1]) or (one is None and "=" in answer) or (other is None and "=" in known):
        return answer, known
    return (one[2].strip() if one and "," not in _outside(one[2]) else answer,
            other[2].strip() if other and "," not in _outside(other[2]) else known)  # fmt: skip


def _outside(text: str) -> str:
    """A text without what is in its brackets."""
    return re.sub(r"[(\[{].*[)\]}]", "", text)


def _as_numbers(answer: str, known: str) -> bool | None:
    """Whether two plain numbers are equal; None if one of the two is none."""
    one, other = plain_number(answer), plain_number(known)
    return None if one is None or other is None else equal_numbers(one, other)


def _without_units(answer: str, known: str) -> tuple[str, str, Any]:
    """Both without their units, and the ratio of these; None if they measure different things."""
    (one, of_answer), (other, of_known) = split_unit(answer), split_unit(known)
    if of_answer is None and of_known is None:
        return answer, known, 1
    if of_answer is None or of_known is None:
        without = known if of_answer else answer
        if words(without) or without.endswith("%"):
            return answer, known, None  # another unit, which is not among the known ones
        number, text = (one, answer) if of_answer else (other, known)
        written = plain_number(number)
        if not (is_unit_alone(text[len(number) :]) or (written and written.unit_in_last_place)):
            return answer, known, 1
        return one, other, 1
    answer, known = one, other
    return answer, known, of_answer[1] / of_known[1] if of_answer[0] == of_known[0] else None


def _in_bases(answer: str, known: str) -> bool | None:
    """Whether two numbers with a base are equal; where only one names a base, whether their digits are."""
    one, other = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(known)
    if one is None and other is None:
        return None
    values = []
    for match, text in ((one, answer), (other, known)):
        digits, base = (match[1] or match[3], int(match[2] or match[4])) if match else (text, 0)
        try:
            values.append((digits.lower().lstrip("0"), int(digits, base) if 2 <= base <= 36 else None))
        except ValueError:  # such as a_1, or 9 in base 8
            return None
    if one and other:
        return values[0][1] == values[1][1] and values[0][1] is not None
    return values[0][0] == values[1][0]


def _is_text(answer: str) -> bool:
    return bool(words(answer)) and re.fullmatch(r"(?:[^\W\d_]|[\s,.;:!?'\"()&-])+", answer) is not None


def _as_texts(answer: str, known: str) -> bool | None:
    """Whether two texts are equal but for case and punctuation; None if both are mathematics."""
    if not (_is_text(answer) or _is_text(known)):
        return None
    one, other = (" ".join(re.findall(r"\w+", text.casefold())) for text in (answer, known))
    return _SAME_TEXTS.get(one, one) == _SAME_TEXTS.get(other, other)


def _without_words(answer: str, known: str) -> tuple[str, str]:
    """Both without the words after the number where only one has words: 5 apples is 5."""
    of_answer, of_known = words(answer), words(known)
    if bool(of_answer) == bool(of_known):
        return answer, known
    match = _ENDS_IN_WORDS.fullmatch(answer if of_answer else known)
    if match is None or words(match[1]) or len(match[2].split()) > MOST_WORDS_DROPPED:
        return answer, known
    if _MEANS_ANOTHER.search(match[2].split(" between ")[0]):  # what follows describes the things that are counted
        return answer, known
    return (match[1], known) if of_answer else (answer, match[1])
