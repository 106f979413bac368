"""Finds questions that are among others: the same but for writing, or with thirteen words in a row in common.

Thirteen words are what language models' benchmarks are usually kept apart by. A phrase that a whole competition uses
counts as well, so a few questions are found that only share their last sentence.
"""

import re
import unicodedata
from collections.abc import Iterable

WORDS_IN_A_ROW = 13
_IGNORED = re.compile(r"[.,;:!?]+(?=\s|$)|\$|\\[()\[\]]")
_WORD = re.compile(r"[^\W_]+")


def normalised(text: str) -> str:
    """A question without case, dollar signs, punctuation at the end of words, and with single spaces."""
    text = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(_IGNORED.sub(" ", text).split())


class Overlap:
    """Questions that others are compared with. Memory grows with their words.

    Args:
        questions: texts.
    """

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self._texts: set[str] = set()
        self._rows_of_words: set[str] = set()
        for question in questions:
            text = normalised(question)
            self._texts.add(text)
            self._rows_of_words.update(_rows_of_words(text))

    def __contains__(self, question: str) -> bool:
        """Whether one of the questions is the same, or has a row of thirteen words in common with this one."""
        if not self._texts:
            return False
        text = normalised(question)
        return text in self._texts or not self._rows_of_words.isdisjoint(_rows_of_words(text))


def _rows_of_words(text: str) -> list[str]:
    words = _WORD.findall(text)
    return [" ".join(words[start : start + WORDS_IN_A_ROW]) for start in range(len(words) - WORDS_IN_A_ROW + 1)]
