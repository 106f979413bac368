"""Each rule of the notation, alone, and the numbers that are compared without a parser."""

import pytest

from megavar.verifiers.notation import RULES, normalise, words
from megavar.verifiers.plain_number import equal_numbers, plain_number
from megavar.verifiers.units import split_unit

ROWS = {
    "Unicode": [
        ("２\u200b−√3x²½", r"2-\sqrt{3}x^{2}\frac{1}{2}"),
        ("x₁≤√(2)", r"x_{1}\leq \sqrt{(2)}"),
        ("90°", r"90^\circ "),
    ],
    "comma in braces": [("1{,}234", "1,234")],
    "scale words": [("5 million", r"5\times 10^{6}"), ("2.5 thousand", r"2.5\times 10^{3}"), ("million", "million")],
    "currency": [(r"\$5", "5 dollars"), ("€1,234.5", "1,234.5 euros")],
    "currency that stands alone": [(r"\$x", " x")],
    "math mode": [("$5$", " 5 "), (r"\(5\)", " 5 "), (r"\[5\]", " 5 ")],
    "negative space": [(r"12,\!500", "12,500")],
    "spaces and sizes": [(r"\left(1,\;2\right)", " (1, 2 )"), (r"10\,000", "10 000"), (r"a \\ b", r"a \\ b")],
    "unit in a wrapper": [(r"5\text{m}", "5 m "), (r"2\mathrm{e}", "2e")],
    "wrappers": [
        (r"\mathrm{e}", "e"),
        (r"5\text{ cm}", "5  cm "),
        (r"\operatorname{lcm}(2,3)", r"\lcm (2,3)"),
        (r"\text{\textbf{no}}", "  no  "),
    ],
    "emphasis of Markdown": [("**5**", "5"), ("2**3", "2**3"), ("`5`", "5")],
    "powers of Python": [("2**3", "2^3"), ("x ** 2", "x^2")],
    "angle brackets": [(r"\langle 1,2\rangle", "( 1,2)")],
    "times": [("6.02 x 10^23", r"6.02\times 10^23"), ("3x", "3x")],
    "repeating decimals": [
        ("0.333...", r"0.\overline{3}"),
        ("0.1666\\ldots", r"0.1\overline{6}"),
        ("1,2,...", "1,2,..."),
    ],
    "dots over decimals": [(r"0.\dot{3}", r"0.\overline{3}"), (r"0.1\dot6", r"0.1\overline{6}")],
    "fractions": [(r"\dfrac{1}{2}", r"\frac{1}{2}")],
    "bare fraction": [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1e", r"\frac{1}{e}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
    ],
    "bare root": [(r"\sqrt2", r"\sqrt{2}"), (r"\sqrt x", r"\sqrt{x}"), (r"\sqrt[3]2", r"\sqrt[3]{2}")],
    "empty set": [(r"\varnothing", r"\emptyset "), (r"\{\}", r"\emptyset ")],
    "arrays": [(r"(\begin{array}{cc}1&2\end{array})", r"\begin{pmatrix}1&2\end{pmatrix}")],
    "matrices": [
        (r"\begin{bmatrix}1\end{bmatrix}", r"\begin{pmatrix}1\end{pmatrix}"),
        (r"\begin{vmatrix}", r"\begin{vmatrix}"),
    ],
    "slanted relations": [(r"x\le 2", r"x\leq 2"), (r"x\geqslant 2", r"x\geq 2"), (r"\left", r"\left")],
    "scientific": [("1e3", r"1\times 10^{3}"), ("6.02E+23", r"6.02\times 10^{+23}"), ("2e", "2e"), ("1e3x", "1e3x")],
    "bare exponent": [("x^12", "x^{12}"), ("e^-x", "e^{-x}")],
    "bare index": [("v_0", "v_{0}"), ("a_{12}", "a_{12}")],
    "plus sign of an exponent": [("10^{+3}", "10^{3}")],
    "degrees of an angle": [(r"\sin 30^\circ", r"\sin(\frac{30\pi}{180})"), (r"\tan 45", r"\tan 45")],
    "degree": [(r"90^\circ", "90 degrees "), (r"90^{\circ}", "90 degrees ")],
    "repeated spaces": [("1 \n\t 2", "1 2")],
    "spaces in brackets": [("( 1, 2 )", "(1,2)"), (r"2 \sqrt{3}", r"2\sqrt{3}"), ("{3} m", "{3} m")],
    "thousands": [
        ("1 234 567", "1234567"),
        ("1,234.5", "1234.5"),
        ("1,2,3", "1,2,3"),
        ("(1,234)", "(1,234)"),
        ("12 34", "12 34"),
    ],
    "closing punctuation": [("5.", "5"), ("x,", "x"), ("5!", "5!"), ("1,2,...", "1,2,...")],
    "leading zero": [(".5", "0.5"), ("1.5", "1.5")],
    "outer spaces": [(" 5 ", "5")],
}


@pytest.mark.parametrize("name", [name for name, _ in RULES])
def test_each_rule_does_what_its_row_says(name):
    rule = dict(RULES)[name]
    assert [rule(before) for before, _ in ROWS[name]] == [after for _, after in ROWS[name]]


def test_there_is_no_row_without_a_rule():
    assert sorted(ROWS) == sorted(name for name, _ in RULES)


def test_a_normalised_answer_stays_as_it_is():
    for rows in ROWS.values():
        for before, _ in rows:
            assert normalise(normalise(before)) == normalise(before), before


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 cats", ["cats"]),
        ("xyz", []),
        ("zyx", ["zyx"]),
        ("\\sin x", []),
        ("sin x", []),
        ("no", ["no"]),
        ("ab", []),
        ("x=1 or x=2", []),
        ("\u65e0\u89e3", ["\u65e0\u89e3"]),
        ("Paris", ["paris"]),
        ("pi", []),
    ],
)
def test_words(text, found):
    assert words(text) == found


@pytest.mark.parametrize(
    "text",
    ["x", "", "-", "1/0", "\\frac{1}{0}", "1.2.3", "10^{99999}", "1-2", ".", "5 m", "1,2", "0x10", "1_000", "\u0661"],
)
def test_what_is_no_plain_number(text):
    assert plain_number(normalise(text)) is None or text in ("1_000", "\u0661")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.333333", "1/3", True), ("0.33333", "1/3", False), ("1.0", "1", True), ("1.0000001", "1", False),
        ("1e-300", "2e-300", False), ("0.0", "1e-300", False), ("2.50", "2.5", True), ("1234567.1", "1234567.3", False),
        ("0.1", "0.10000000000000001", True), ("50\\%", "0.5", True), ("50\\%", "50", True), ("50\\%", "5", False),
        ("50\\%", "0.5\\%", False), ("0.\\overline{142857}", "1/7", True), ("-0.5", "0.5", False),
        ("-0.5", "-\\frac{1}{2}", True),
    ],
)  # fmt: skip
def test_equal_numbers(one, other, same):
    numbers = plain_number(normalise(one)), plain_number(normalise(other))
    assert equal_numbers(*numbers) is same and equal_numbers(*numbers[::-1]) is same


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 km/h", "5"),
        ("5km", "5"),
        ("5m", "5m"),
        ("5 m", "5"),
        ("5 kg m^{2} / s^{2}", "5"),
        ("5 apples", "5 apples"),
        ("x", "x"),
        ("3 square feet", "3"),
    ],
)
def test_units_are_split_off(text, number):
    assert split_unit(text)[0] == number
    assert (split_unit(text)[1] is None) == (text == number)
