"""What math-verify overlooks or merges, compared in the notation: order, primes, dots, conditions, parts."""

import re
from collections import Counter
from fractions import Fraction

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_RELATIONS = re.compile(r"\\(?:leq|geq|neq|lt|gt|ll|gg|approx|sim)(?![A-Za-z])|[<>=]")
_DIFFERENTIAL = re.compile(r"(?:\\partial|(?<![A-Za-z\\])d)\s*([A-Za-z])(?![A-Za-z])")
_DOTS = re.compile(r"\.\.\.|\\[lcd]?dots[a-z]?(?![A-Za-z])")
_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*([^\W\d_]{2,})")
_PART = re.compile(r"(?<![A-Za-z\\])\(\s*(?:[a-h]|i{1,3}|iv|\d)\s*\)\s*[^,)\s]")
_SET_BUILDER = re.compile(r"\\?\{(.*?)(?:\\mid|\\vert|:|\|)(.*)\\?\}")
_FORMULA = re.compile(r"(?:[A-Z][a-z]?(?:_\{?\d+\}?|\d+)?)+")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+){2,}")


def certainly_differ(answer: str, known: str) -> bool | None:
    """Whether two normalised answers are different (True) or equal (False) by what is compared here; None: not said."""
    for compare in (_dots, _ratios, _parts, _cases, _set_builders, _formulas, _derivatives, _signs, _order):
        if (verdict := compare(answer, known)) is not None:
            return verdict
    return None


def _different_texts(answer: str, known: str) -> bool:
    return "".join(answer.split()) != "".join(known.split())


def _dots(answer: str, known: str) -> bool | None:
    """1,2,3,... is not 1,2,3, and what the dots stand for is read from nothing else."""
    if _DOTS.search(answer) or _DOTS.search(known):
        return _different_texts(_DOTS.sub("...", answer), _DOTS.sub("...", known))
    return None


def _ratios(answer: str, known: str) -> bool | None:
    """a : b : c, up to a factor."""
    if not (_RATIO.fullmatch(answer) and _RATIO.fullmatch(known)):
        return None
    one, other = ([int(part) for part in re.findall(r"\d+", text)] for text in (answer, known))
    if len(one) != len(other) or not all(one) or not all(other):
        return one != other
    return len({Fraction(left, right) for left, right in zip(one, other, strict=True)}) > 1


def _parts(answer: str, known: str) -> bool | None:
    """(a) 2 (b) 1, and 2 hours 30 minutes: in the same order."""
    if len(_PART.findall(answer)) > 1 or len(_PART.findall(known)) > 1:
        return _different_texts(answer, known)
    one, other = _COMPOUND.findall(answer), _COMPOUND.findall(known)
    if len(one) > 1 and len(other) > 1:
        return [(n, word.casefold().rstrip("s")) for n, word in one] != [
            (n, word.casefold().rstrip("s")) for n, word in other
        ]
    return None


def _cases(answer: str, known: str) -> bool | None:
    """Rows of value and condition, in any order."""
    rows = []
    for text in (answer, known):
        inside = re.search(r"\\begin\{cases\}(.*)\\end\{cases\}", text, re.DOTALL)
        if inside is None:
            continue
        bare = re.sub(r"\s|\\text|if|when|for", "", inside[1])
        rows.append(Counter(row.strip(",.;") for row in bare.split("\\\\") if row))
    return None if not rows else len(rows) == 1 or rows[0] != rows[1]


def _set_builders(answer: str, known: str) -> bool | None:
    one, other = _SET_BUILDER.fullmatch(answer), _SET_BUILDER.fullmatch(known)
    if one is None or other is None:
        return None
    return any(_different_texts(left, right) for left, right in zip(one.groups(), other.groups(), strict=True))


def _formulas(answer: str, known: str) -> bool | None:
    """C6H12O6."""
    texts = [re.sub(r"[_{}\s]", "", text) for text in (answer, known)]
    if all(
        _FORMULA.fullmatch(text) and len(re.findall(r"[A-Z]", text)) > 1 and re.search(r"\d", text) for text in texts
    ):
        return texts[0] != texts[1]
    return None


def _derivatives(answer: str, known: str) -> bool | None:
    one, other = _DIFFERENTIAL.findall(answer), _DIFFERENTIAL.findall(known)
    if one and other:
        return True if one != other else None
    if not (one or other) and Counter(re.findall(r"([A-Za-z]*)('+)", answer)) != Counter(
        re.findall(r"([A-Za-z]*)('+)", known)
    ):
        return True
    return None


def _signs(answer: str, known: str) -> bool | None:
    """Plus-minus before minus-plus; and, or between relations; products of vectors."""
    texts = answer, known
    signs = [re.findall(r"\\(?:pm|mp)(?![A-Za-z])", text) for text in texts]
    if signs[0] and signs[1] and signs[0] != signs[1]:
        return True
    if all(_RELATIONS.search(text) for text in texts):
        joined = [set(re.findall(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])", text)) for text in texts]
        if joined[0] and joined[1] and joined[0] != joined[1]:
            return True
    if all(re.search(r"\\(?:vec|mathbf|boldsymbol|hat)(?![A-Za-z]).*\\times", text) for text in texts):
        return _different_texts(answer, known)
    return None


def _order(answer: str, known: str) -> bool | None:
    ordered = _is_ordered(answer), _is_ordered(known)
    return True if None not in ordered and ordered[0] != ordered[1] else None


def _is_ordered(answer: str) -> bool | None:
    """Whether a normalised answer is an ordered collection, such as (1,2); None if it is no collection of values."""
    text = answer.replace("\\{", "{").replace("\\}", "}").strip()
    if "=" in text or "\\cup" in text or "\\cap" in text or len(text) < 3:
        return None
    bracket = text[0] if _CLOSING.get(text[0]) == text[-1] and _closes_at_end(text) else ""
    if bracket == "[" or not _has_comma(text[1:-1] if bracket else text):
        return None
    return bracket == "("


def _closes_at_end(text: str) -> bool:
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _has_comma(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char in ",;":
            return True
    return bool(re.search(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])", text))
