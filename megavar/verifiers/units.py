"""Units after a number: which quantity they measure, and how large they are."""

import re
from fractions import Fraction

Dimensions = tuple[tuple[str, int], ...]
"""(quantity, exponent), sorted."""
_PREFIXES = {
    "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "h": 2, "d": -1, "c": -2, "m": -3, "u": -6, "μ": -6, "µ": -6, "n": -9,
    "p": -12, "f": -15,
}  # fmt: skip
_PREFIX_WORDS = {
    "": 0, "kilo": 3, "mega": 6, "giga": 9, "hecto": 2, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9,
    "pico": -12,
}  # fmt: skip
_SI = {
    "m": "meter metre", "g": "gram", "s": "second", "L": "liter litre", "l": "", "N": "newton", "J": "joule",
    "W": "watt", "V": "volt", "A": "ampere amp", "Pa": "pascal", "Hz": "hertz", "C": "coulomb", "F": "farad",
    "K": "kelvin", "mol": "mole", "eV": "electronvolt", "cal": "calorie", "B": "byte", "T": "tesla", "Wb": "weber",
}  # fmt: skip
"""Symbols and names of units that take the prefixes."""
_OTHERS: dict[str, dict[str, int | Fraction]] = {
    "time": {"min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800, "sec": 1},
    "months": {"month": 1, "yr year": 12, "decade": 120, "century centuries": 1200},
    "length": {"in inch": Fraction("0.0254"), "ft foot feet": Fraction("0.3048"), "yd yard": Fraction("0.9144"),
               "mi mile": Fraction("1609.344")},
    "mass": {"lb pound": Fraction("0.45359237"), "oz ounce": Fraction("0.028349523125"), "ton tonne": 1000},
    "pounds sterling": {"sterling": 1}, "yen": {"yen": 1, "jpy": 1},
    "money": {"dollar usd": 1, "cent ¢": Fraction(1, 100)},
    "euros": {"euro eur": 1}, "rupees": {"rupee rs": 1}, "rand": {"rand": 1},
    "angle": {"degree deg": 1}, "radians": {"radian rad": 1},
    "quarts": {"gal gallon": 4, "quart": 1}, "acres": {"acre": 1}, "hectares": {"ha hectare": 1},
    "bits": {"bit": 1}, "ohms": {"ohm Ω": 1}, "": {"unit": 1, "people person": 1},
    "time before noon": {"am": 1}, "time after noon": {"pm": 1}, "temperature in C": {"celsius": 1},
    "temperature in F": {"fahrenheit": 1},
}  # fmt: skip
_QUANTITY = {"m": "length", "g": "mass", "s": "time", "L": "volume", "l": "volume"}
_TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
_SPEEDS = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h"}
_AREAS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def _known_units() -> dict[str, tuple[str, Fraction]]:
    units: dict[str, tuple[str, Fraction]] = {}
    for symbol, names in _SI.items():
        quantity, base = _QUANTITY.get(symbol, symbol), Fraction(1, 1000) if symbol == "g" else Fraction(1)
        for prefix, exponent in _PREFIXES.items():
            units[prefix + symbol] = (quantity, base * Fraction(10) ** exponent)
        for name in names.split():
            for prefix, exponent in _PREFIX_WORDS.items():
                for plural in ("", "s"):
                    units[prefix + name + plural] = (quantity, base * Fraction(10) ** exponent)
    for quantity, of_quantity in _OTHERS.items():
        for names, size in of_quantity.items():
            for name in names.split():
                for plural in ("", "s", "es"):
                    units[name + plural] = (quantity, Fraction(size))
    return units


_UNITS = _known_units()
_FACTOR = re.compile(
    r"\s*(?P<divided>/|per\b|\\cdot|\\times|\*)?\s*(?P<area>(?:square|sq|cubic|cu)\b\.?)?\s*"
    r"(?P<unit>[A-Za-zµμΩ¢]+)\.?\s*(?:\^\s*\{?\s*(?P<exponent>-?\d)\s*\}?)?"
)
_AT_END = re.compile(
    r"(?<=[\d})%])(\s*)((?=[A-Za-zµμΩ¢/])(?:[/*A-Za-zµμΩ¢.\s]|\\cdot|\\times|\^\s*\{?\s*-?\d\s*\}?)+)$"
)


def split_unit(answer: str) -> tuple[str, tuple[Dimensions, Fraction] | None]:
    """A normalised answer without the unit at its end, and that unit: its dimensions and its size.

    A single letter without a space before it is a variable: 5 m is a length, 5m is five times m.
    """
    match = _AT_END.search(answer)
    if match is None or not match[2].strip() or (not match[1] and len(match[2].strip()) == 1):
        return answer, None
    unit = _parsed(match[2].strip())
    return (answer, None) if unit is None else (answer[: match.start()].strip(), unit)


def is_unit_alone(text: str) -> bool:
    """Whether a unit may be left out: one that is no product of single letters, which are rather variables."""
    letters = re.findall(r"[A-Za-zµμΩ]+", text)
    return len(letters) < 2 or any(len(word) > 1 for word in letters) or "/" in text


def _parsed(text: str) -> tuple[Dimensions, Fraction] | None:
    text = re.sub(r"^degrees?\s+(C|F)(?:elsius|ahrenheit)?$", lambda match: _TEMPERATURES[match[1]], text)
    text = re.sub(r"(?<![A-Za-z])(mph|kmph|kph)(?![A-Za-z])", lambda match: _SPEEDS[match[1]], text)
    dimensions: dict[str, int] = {}
    size, position = Fraction(1), 0
    while position < len(text):
        match = _FACTOR.match(text, position)
        if match is None or match.end() == position or (not position and match["divided"] not in (None, "per", "/")):
            return None
        unit = _UNITS.get(match["unit"]) or _UNITS.get(match["unit"].lower())
        if unit is None:
            return None
        exponent = int(match["exponent"] or _AREAS.get((match["area"] or "").strip("."), 1))
        exponent = -exponent if match["divided"] in ("/", "per") else exponent
        quantity, base = unit
        if quantity:
            dimensions[quantity] = dimensions.get(quantity, 0) + exponent
        size *= base**exponent
        position = match.end()
    return tuple(sorted((name, power) for name, power in dimensions.items() if power)), size
