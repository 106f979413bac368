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
    """The words of a text, casefolded; without articles, if there is anything else."""
    text = normalise(unicodedata.normalize("NFKC", text))
    # Signs and points belong to numbers: -5 is not 5, and 1.5 is not 15.
    found = re.findall(r"(?<![\w.])-?\d+(?:[.,:/]\d+)*%?|[^\W\d]+(?:['’][^\W\d]+)*|\d+", text.casefold())
    return [word.replace("'", "").replace("’", "") for word in found if word not in _ARTICLES] or found
