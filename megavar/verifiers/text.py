"""Verifier `text`: equality of short texts, whatever their case, punctuation and articles."""

import re
import unicodedata

from megavar.records import Verdict
from megavar.verifiers.final_answer import last_box, stated_answer
from megavar.verifiers.notation import normalise

_ARTICLES = {"a", "an", "the"}
MAX_CHARACTERS = 1000
"""Of an answer."""


def verify(response: str, gold: str) -> Verdict:
    """Compare the last \\boxed{...}, what follows "answer is", or else the last line, with any of the known answers.

    Args:
        gold: the answers that are right, separated by `|`: `grey | gray`.

    Raises:
        ValueError: if one of them has neither letters nor digits.
    """
    known = [_form(alias) for alias in gold.split("|")]
    if not all(known):
        raise ValueError(f"the ground-truth answer {gold!r:.200} has an alias without letters or digits")
    answer = last_box(response)
    if answer is None:
        last_line = next((line for line in reversed(response.splitlines()) if line.strip()), "")
        answer = stated_answer(response) or last_line
    if len(answer) > max(MAX_CHARACTERS, 2 * len(gold)):
        return Verdict.WRONG
    form = _form(answer)
    if not form:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if form in known else Verdict.WRONG


def _form(text: str) -> list[str]:
    """The words of a text, casefolded, with the signs that belong to them; without its articles."""
    text = re.sub(r"(?<=[^\W\d_])[-\u2010-\u2015](?=[^\W\d_])", " ", normalise(text).casefold())
    text = re.sub(r"(?<=\d)\s+%", "%", re.sub(r"(?<![^\W_])([^\W\d_])\.(?=[^\W\d_]\b)", r"\1", text))
    text = re.sub(r"(?<!\d)[.,:]+|[.,:]+(?!\d)", " ", text)  # those in a number belong to it: 1.5 is not 15
    kept = "".join(char if _belongs(char) else "" if char in "'\u2019" else " " for char in text)
    found = kept.split()
    without = [word for index, word in enumerate(found) if not _is_article(word, index, len(found))]
    return without or found


def _belongs(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char) in ("Mn", "Mc") or char in "+-#<>*^\\/%.,:\u266f\u266d"


def _is_article(word: str, index: int, count: int) -> bool:
    return (word == "the" or (word in _ARTICLES and index == 0)) and index < count - 1
