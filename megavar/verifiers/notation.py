"""Brings the notation of a mathematical answer into one form: one row a habit of writing, applied in order."""

import re
import unicodedata
from collections.abc import Callable
from functools import partial

_FRACTIONS = {
    char: unicodedata.normalize("NFKC", char).split("\u2044")
    for char in map(chr, [*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189])
}
_FRACTIONS = {char: parts for char, parts in _FRACTIONS.items() if len(parts) == 2 and parts[1]}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ", "0123456789+-=()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()")
_SYMBOLS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\ufe63": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "\u2044": "/", "∗": "*",
    "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "±": r"\pm ",
    "∓": r"\mp ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∀": r"\forall ",
    "∃": r"\exists ", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "π": r"\pi ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "¬": r"\neg ",
    "∼": r"\sim ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "。": ".", "、": ",", "，": ",",
}  # fmt: skip
_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF])
"""Soft hyphens, spaces and joiners without width; not those that turn the direction of what follows."""
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_UNDER_ROOT = r"\s*(\{[^{}]*\}|\([^()]*\)|\\?[A-Za-z]|\d+(?:\.\d+)?)?"
_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|lim|max|min|gcd|lcm|det|deg|dim|arg|mod"
)
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal"
    r"|operatorname\*?|boldsymbol|bold|bm|emph|underline|boxed)\s*\{([^{}]*)\}"
)
_SPACES = (
    r"(?<!\\)\\[,;:! ]|\\(?:quad|qquad|thinspace|enspace|displaystyle|textstyle|left|right|limits"
    r"|big[lrg]?|Big[lr]?|bigg[lr]?|Bigg[lr]?)(?![A-Za-z])\.?|\\hspace\s*\{[^{}]*\}|~"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CURRENCIES = {"\\$": "dollars", "€": "euros", "£": "sterling", "¥": "yen"}
_AMOUNT = r"\d[\d,]*(?:\.\d+)?(?:\\times 10\^\{\d+\})?"
_BARE_ARGUMENT = r"(\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z0-9])"


def _one_line(text: str) -> str:
    """Superscripts, fractions, roots and symbols of Unicode as LaTeX; compatibility forms; invisible characters."""
    if text.isascii():
        return text
    for table, mark in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
        run = "[" + "".join(re.escape(chr(code)) for code in table) + "]+"
        text = re.sub(run, partial(_raised, mark, table), text)
    for char, (top, bottom) in _FRACTIONS.items():
        text = text.replace(char, f"\\frac{{{top}}}{{{bottom}}}")
    for char, command in _ROOTS.items():
        text = re.sub(char + _UNDER_ROOT, partial(_root, command), text)
    for char, command in _SYMBOLS.items():
        text = text.replace(char, command)
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/").translate(_INVISIBLE)


def _raised(mark: str, table: dict[int, int], match: re.Match[str]) -> str:
    return f"{mark}{{{match[0].translate(table)}}}"


def _root(command: str, match: re.Match[str]) -> str:
    return f"{command}{{{(match[1] or '').strip('{}')}}}"


def _without_wrappers(text: str) -> str:
    """\\text{...} and the like as what they hold: a letter, a function, or words between spaces."""
    for _ in range(4):  # one in another
        text, count = _WRAPPER.subn(lambda match: _unwrapped(match[1]), text)
        if not count:
            break
    return text


def _unwrapped(content: str) -> str:
    if re.fullmatch(_FUNCTIONS, content):
        return f"\\{content} "
    return content if len(content.strip()) == 1 and content.strip().isalnum() else f" {content} "


def _thousands(text: str) -> str:
    """1,234,567 (if it is all there is), 1 234 567 and 1'234'567 as one number."""
    text = re.sub(
        r"(?<![\d.,])\d{1,3}(?:[ '_]\d{3})+(?!\d|\s*/|\s*\\frac)", lambda match: re.sub(r"\D", "", match[0]), text
    )
    whole = re.fullmatch(r"(\D{0,3}?)(\d{1,3}(?:,\d{3})+)(?=[^,\d]|$)([^,]*)", text)
    return whole[1] + re.sub(r"\D", "", whole[2]) + whole[3] if whole and not re.search(r"[(\[{]", whole[1]) else text


def _substitute(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)


RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Unicode", _one_line),
    ("comma in braces", _substitute(r"\{\s*,\s*\}", ",")),
    ("scale words", _substitute(r"(?<=\d)\s*(thousand|million|billion|trillion)s?(?![A-Za-z])",
                                lambda match: f"\\times 10^{{{_SCALES[match[1]]}}}")),
    ("currency", _substitute(rf"(\\\$|[€£¥])\s*({_AMOUNT})", lambda match: f"{match[2]} {_CURRENCIES[match[1]]}")),
    ("currency that stands alone", _substitute(r"\\\$|[€£¥]", " ")),
    ("math mode", _substitute(r"\$|(?<!\\)\\[()\[\]]", " ")),
    ("negative space", _substitute(r"(?<!\\)\\!\s*", "")),
    ("spaces and sizes", _substitute(_SPACES, " ")),
    ("unit in a wrapper", _substitute(r"(?<=[\d}])\\(?:text|mathrm|mbox)\s*\{\s*([A-Za-z])\s*\}",
                                      lambda match: match[1] if match[1] in "eid" else f" {match[1]} ")),
    ("wrappers", _without_wrappers),
    ("emphasis of Markdown", _substitute(r"(?<![\w)}\]*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w({\[*])|`", r"\2")),
    ("powers of Python", _substitute(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\[\\-])", "^")),
    ("angle brackets", _substitute(r"\\[lr]angle(?![A-Za-z])", lambda match: "(" if match[0] == "\\langle" else ")")),
    ("times", _substitute(r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times ")),
    ("repeating decimals", _substitute(r"(?<=\.)(\d*?)(\d)\2{2,}(?:\.\.\.|\\[lc]?dots(?![A-Za-z]))",
                                       r"\1\\overline{\2}")),
    ("dots over decimals", _substitute(r"(?<=[\d.])\\dot\s*\{?\s*(\d)\s*\}?", r"\\overline{\1}")),
    ("fractions", _substitute(r"\\[dtc]frac(?![A-Za-z])", r"\\frac")),
    ("bare fraction", _substitute(rf"\\frac\s*(?!\{{[^{{}}]*\}}\s*\{{){_BARE_ARGUMENT}\s*{_BARE_ARGUMENT}",
                                  lambda match: f"\\frac{{{match[1].strip('{}')}}}{{{match[2].strip('{}')}}}")),
    ("bare root", _substitute(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d|[A-Za-z])(?![A-Za-z])", r"\\sqrt\1{\2}")),
    ("empty set", _substitute(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset ")),
    ("arrays", _substitute(r"[(\[]\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*[)\]]",
                           r"\\begin{pmatrix}\1\\end{pmatrix}")),
    ("matrices", _substitute(r"\\(begin|end)\s*\{(?:b|B|small)?matrix\}", r"\\\1{pmatrix}")),
    ("slanted relations", _substitute(r"\\(l|g)(?:eqslant|e)(?![A-Za-z])", r"\\\1eq")),
    ("scientific", _substitute(r"(?<=\d)\s*[eE]\s*([+-]?\d+)(?!\w|\.\d)", r"\\times 10^{\1}")),
    ("bare exponent", _substitute(r"\^\s*(-?\d+|-[A-Za-z])(?![\d}])", r"^{\1}")),
    ("bare index", _substitute(r"_\s*([0-9A-Za-z])(?![0-9A-Za-z])", r"_{\1}")),
    ("plus sign of an exponent", _substitute(r"\^\{\s*\+\s*(\d+)\s*\}", r"^{\1}")),
    ("degrees of an angle", _substitute(
        r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*[)}]?",
        r"\\\1(\\frac{\2\\pi}{180})")),
    ("degree", _substitute(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", " degrees ")),
    ("repeated spaces", _substitute(r"\s+", " ")),
    ("spaces in brackets", _substitute(r"\s+(?=[,;)\]}\\])|(?<=[,;(\[{])\s+(?!\d{3}(?!\d))", "")),
    ("thousands", _thousands),
    ("closing punctuation", _substitute(r"(?<=[^\s.])\s*(?:[,;:]+|(?<!\.)\.)\s*$", "")),
    ("leading zero", _substitute(r"(?<![\d.}])\.(?=\d)", "0.")),
    ("outer spaces", str.strip),
)  # fmt: skip
"""(name, function from text to text), in order."""


def normalise(answer: str) -> str:
    """An answer in one notation: LaTeX without wrappers, spacing, sizes, math mode and invisible characters."""
    for _, rule in RULES:
        answer = rule(answer)
    return answer


def words(text: str) -> list[str]:
    """Runs of letters in normalised text that are words, casefolded: not names of functions or products of letters."""
    found = re.findall(r"(?<![\\A-Za-z_])[^\W\d_]+(?:['-][^\W\d_]+)*", re.sub(r"\\[A-Za-z]+", " ", text))
    return [run.casefold() for run in found if is_word(run) and run not in ("and", "or")]


def is_word(run: str) -> bool:
    """Whether a run of letters is a word. Letters in alphabetical order may be a product: ab, xyz."""
    if not run.isascii():
        return True
    letters = run.casefold()
    if len(letters) < 2 or re.fullmatch(_FUNCTIONS + "|pi|inf|infty|infinity|sqrt|frac", run):
        return False
    if len(letters) == 2:
        return any(vowel in letters for vowel in "eiou")
    return list(letters) != sorted(set(letters))
