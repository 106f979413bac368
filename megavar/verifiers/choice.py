"""Verifier `choice`: the letter, or letters, of the options of a multiple-choice question."""

import re
import string

from megavar.records import Verdict
from megavar.verifiers.final_answer import last_box, stated_answer
from megavar.verifiers.notation import normalise
from megavar.verifiers.plain_number import equal_numbers, plain_number

_SEPARATOR = r"\s*(?:,|;|/|&|\band\b|\bor\b|\s)\s*"
_LETTER = r"(?:\(\s*([A-Z])\s*\)|\[\s*([A-Z])\s*\]|([A-Z]))"
_ONE_LETTER = re.compile(_LETTER + r"(?![A-Za-z0-9'_^=+])")
_LETTERS = re.compile(rf"{_LETTER}(?:{_SEPARATOR}{_LETTER})*[.):]?")
_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])\s*[.):])\s*(\S.*)", re.DOTALL)
_OPTION = re.compile(r"^[^\S\n]*(?:\(([A-Z])\)|([A-Z])[.):])[^\S\n]+(\S[^\n]*)$", re.MULTILINE)
_DENIED = re.compile(r"(?<![A-Za-z])(?i:not|wrong|incorrect|false)(?![A-Za-z])|[([][A-Z][)\]]|(?<![A-Za-z.])[A-Z][):]")
"""In the text after a letter: it is denied, or another one follows."""
_LEAD = re.compile(
    r"^(?:(?:the|correct|right|final|best)\s+)*(?:option|choice|answer|letter)s?(?![A-Za-z])\s*"
    r"(?:(?:is|are)(?![A-Za-z]))?\s*[:=]?\s*",
    re.IGNORECASE,
)
_SAID = re.compile(
    rf"(?:^|[\n.!?:;]\s*|\b(?:[Ss]o|[Tt]hus|[Tt]herefore|[Hh]ence),?\s+)(?:(?:[Oo]ption|[Cc]hoice)\s+)?{_LETTER}\s+is\s+"
    r"(?:the\s+)?(?:correct|right|best)(?![A-Za-z])"
)
MAX_RESPONSE_CHARACTERS, MAX_LINE_CHARACTERS, MAX_BOX_CHARACTERS = 20_000, 40, 500


def is_option(gold: str) -> bool:
    """Whether a ground-truth answer is the letter of an option, alone or with the option's text."""
    text = normalise(gold.split("\n", 1)[0])
    return re.fullmatch(r"\(?[A-J]\)?[.)]?", text) is not None or (
        (match := _WITH_TEXT.fullmatch(text)) is not None
        and (match[1] or match[2] or match[3]) <= "J"
        and not re.match(r"[A-Z]\s*:", text)
        and not re.search(r"=|[A-Z]\s*[.):]", match[4])
    )


def with_options(gold: str, question: str) -> str:
    """A ground-truth answer, followed by the options that the question lists, one a line.

    Letters that do not count up from A are those of lines with several options, of which none is taken.
    """
    options = [(match[1] or match[2], match[3]) for match in _OPTION.finditer(question)]
    if [letter for letter, _ in options] != list(string.ascii_uppercase[: len(options)]) or len(options) == 1:
        return gold
    return "\n".join([gold, *(f"{letter}. {text}" for letter, text in options)])


def verify(response: str, gold: str) -> Verdict:
    """Compare the letters of the last \\boxed{...}, or of the sentence that states the answer, with those of `gold`.

    An option's text stands for its letter if it is the text of only one.

    Args:
        gold: one letter or several (`C`, `(C)`, `A, C`), one with its text (`C. 12`); options may follow, one a line
            (`with_options`).

    Raises:
        ValueError: if `gold` is no letter, or not that of an option.
    """
    first, _, rest = gold.partition("\n")
    options = {match[1] or match[2]: match[3] for match in _OPTION.finditer(rest)}
    box = last_box(first)
    known_text = normalise(first if box is None else box)
    with_text = _WITH_TEXT.fullmatch(known_text)
    known = _letters(known_text)
    if with_text and known is not None and len(known) == 1:
        options.setdefault(next(iter(known)), with_text[4])
    if not known:
        raise ValueError(f"the ground-truth answer {first!r} is not the letter of an option, such as C or (C)")
    if options and rest and not known <= options.keys():
        raise ValueError(f"the ground-truth answer {first!r} is none of the options {', '.join(sorted(options))}")
    answer = _answer(response, options)
    if answer is None:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if answer == known else Verdict.WRONG


def _answer(response: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letters that a response gives; empty if its box holds something else."""
    box = last_box(response[-MAX_RESPONSE_CHARACTERS:])
    if box is not None:
        if len(box) > MAX_BOX_CHARACTERS:
            return frozenset()
        text = normalise(box).replace("\\rm", "").strip("{} ")
        if not text:
            return None
        return _chosen(_LEAD.sub("", text), options) or frozenset()
    stated = stated_answer(response)
    if stated is None:
        last_line = next((line for line in reversed(response.splitlines()) if line.strip()), "")
        text = normalise(last_line) if len(last_line) < MAX_LINE_CHARACTERS else ""
        if _LETTERS.fullmatch(text):
            return _letters(text)
        said = list(_SAID.finditer(normalise(response[-2000:])))
        return frozenset(letter for letter in said[-1].groups() if letter) if said else None
    text = _LEAD.sub("", normalise(stated))
    return _chosen(text, options) or _leading_letters(text)


def _chosen(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letter of the option with this text, else the letters that it names; an option's text may be a letter too."""
    by_text = None if _LETTERS.fullmatch(text) else _by_text(text, options)
    return by_text or _letters(text, ignore_case=True)


def _letters(text: str, ignore_case: bool = False) -> frozenset[str] | None:
    """The letters that a text consists of, or the one that is followed by an option's text; None if there are none."""
    if ignore_case and re.fullmatch(r"\(?[a-j]\)?", text):
        text = text.upper()
    if re.fullmatch(r"[A-Z]{2,6}", text) and list(text) == sorted(set(text)):
        return frozenset(text)
    if _LETTERS.fullmatch(text):
        return frozenset(letter for groups in _ONE_LETTER.findall(text) for letter in groups if letter)
    if (match := _WITH_TEXT.fullmatch(text)) and not _DENIED.search(match[4]):
        return frozenset(filter(None, match.groups()[:3]))
    return None


def _leading_letters(text: str) -> frozenset[str] | None:
    """The letters that a sentence begins with."""
    match = _LETTERS.match(text)
    if match is None or not re.match(r"[\s.,;:!)*]|$", text[match.end() :]) or re.match(r"[AI]\s+[a-z]", text):
        return None
    return frozenset(letter for groups in _ONE_LETTER.findall(match[0]) for letter in groups if letter)


def _by_text(text: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letter of the only option with this text."""
    having = [letter for letter, option in options.items() if _same_text(text, normalise(option))]
    return frozenset(having) if len(having) == 1 else None


def _same_text(one: str, other: str) -> bool:
    numbers = plain_number(one), plain_number(other)
    if numbers[0] and numbers[1]:
        return equal_numbers(*numbers)  # type: ignore[arg-type]
    return " ".join(one.casefold().split()) == " ".join(other.casefold().split())
