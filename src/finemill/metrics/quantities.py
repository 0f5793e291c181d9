r"""Numbers with units, exact: `1{,}000`, `2 3/4`, `\frac{1}{2}`, `50\\%`, `3 \times 10^8 m`, `18 dollars`."""

import re
from dataclasses import dataclass
from fractions import Fraction

from finemill.rows.characters import plain_characters
from finemill.rows.formulas import CURRENCIES, MAGNITUDES, UNITS, strip_delimiters, tidy
from finemill.rows.si_units import SI_SCALES, SI_UNITS

PERCENT = "%"

_ALIASES = {
    **{mark.lower(): name for mark, name in CURRENCIES.items()},
    "percent": PERCENT,
    "percentage": PERCENT,
    "deg": "degree",
    "m": "meter",
    "metre": "meter",
    "cm": "centimeter",
    "centimetre": "centimeter",
    "mm": "millimeter",
    "dm": "decimeter",
    "decimetre": "decimeter",
    "millimetre": "millimeter",
    "km": "kilometer",
    "kilometre": "kilometer",
    "in": "inch",
    "inches": "inch",
    "ft": "foot",
    "feet": "foot",
    "yd": "yard",
    "mi": "mile",
    "g": "gram",
    "kg": "kilogram",
    "mg": "milligram",
    "lb": "pound mass",
    "lbs": "pound mass",
    "oz": "ounce",
    "l": "liter",
    "litre": "liter",
    "ml": "milliliter",
    "s": "second",
    "sec": "second",
    "secs": "second",
    "min": "minute",
    "mins": "minute",
    "h": "hour",
    "hr": "hour",
    "hrs": "hour",
    "mph": "mile per hour",
    "kph": "kilometer per hour",
    "sq": "square",
    "ohm": "\u03c9",
    "rad": "radian",
    "celsius": "c",
    "centigrade": "c",
    "fahrenheit": "f",
    "kwh": "kilowatt hour",
    "wh": "watt hour",
    "mol": "mole",
    "kw": "kilowatt",
    "kb": "kilobyte",
    "mb": "megabyte",
    "gb": "gigabyte",
    "tb": "terabyte",
    "n": "newton",
    "j": "joule",
    "w": "watt",
    "v": "volt",
    "hz": "hertz",
    "khz": "kilohertz",
    "mhz": "megahertz",
    "ghz": "gigahertz",
    "pa": "pascal",
    "kpa": "kilopascal",
    "kj": "kilojoule",
    "kv": "kilovolt",
    "ma": "milliampere",
    "a": "ampere",
    "amp": "ampere",
    "ha": "hectare",
    "美元": "dollar",
    "元": "yuan",
    "人民币": "yuan",
    "欧元": "euro",
    "円": "yen",
    "日元": "yen",
    "米": "meter",
    "厘米": "centimeter",
    "毫米": "millimeter",
    "千米": "kilometer",
    "公里": "kilometer",
    "克": "gram",
    "千克": "kilogram",
    "公斤": "kilogram",
    "升": "liter",
    "毫升": "milliliter",
    "小时": "hour",
    "时间": "hour",
    "時間": "hour",
    "分钟": "minute",
    "秒": "second",
    "天": "day",
    "度": "degree",
}
_SCALES: dict[str, tuple[str, Fraction]] = {
    **SI_SCALES,
    "kilometer": ("meter", Fraction(1000)),
    "centimeter": ("meter", Fraction(1, 100)),
    "millimeter": ("meter", Fraction(1, 1000)),
    "inch": ("meter", Fraction(254, 10_000)),
    "foot": ("meter", Fraction(3048, 10_000)),
    "yard": ("meter", Fraction(9144, 10_000)),
    "mile": ("meter", Fraction(1_609_344, 1000)),
    "kilogram": ("gram", Fraction(1000)),
    "milligram": ("gram", Fraction(1, 1000)),
    "liter": ("meter ^3", Fraction(1, 1000)),
    "milliliter": ("meter ^3", Fraction(1, 10**6)),
    "minute": ("second", Fraction(60)),
    "hour": ("second", Fraction(3600)),
    "day": ("second", Fraction(86_400)),
    "week": ("second", Fraction(604_800)),
    "year": ("month", Fraction(12)),
    "hectare": ("meter ^2", Fraction(10_000)),
    "decimeter": ("meter", Fraction(1, 10)),
    "tonne": ("gram", Fraction(10**6)),
    "cent": ("dollar", Fraction(1, 100)),
}
"""Units that are a number of others."""
# Names of two units each.
_AMBIGUOUS = frozenset(
    frozenset(pair)
    for pair in (
        ("pound", "pound sterling"),
        ("pound", "pound mass"),
        ("\u00a5", "yen"),
        ("\u00a5", "yuan"),
        ("degree", "degree c"),
        ("degree", "degree f"),
    )
)
# Without a meaning of their own: 12 of a thing.
_COUNTERS = ("个", "個", "只", "名", "人", "つ", "개", "명")
_SENTENCE_ENDS = ("です", "である", "입니다", "이다", "だ")
_SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]{1,10}")
# Words after a number that make it another number, or no number at all.
_NO_UNIT = frozenset(
    """and or to not than less minus plus times over divided by half halves quarter quarters third thirds fourth
    fourths fifth fifths sixth tenth tenths point points zero one two three four five six seven eight nine ten
    eleven twelve twenty thirty forty fifty sixty seventy eighty ninety negative positive pi sqrt sin cos tan
    is are was impossible wrong incorrect log ln exp mod if when where undefined infinity infinite""".split()
)
_MOST_UNIT_WORDS = 6
_LARGEST_EXPONENT = 400
_LONGEST = 200

_WRAPPED = re.compile(
    r"(?P<number>.*?[\d}])\s*(?:\\[,;: ]|~)*\s*\\(?:text|mathrm|textrm|textbf|mbox|operatorname)"
    r"\{(?P<unit>[^{}]*[A-Za-z\u03a9][^{}]*)\}(?P<power>\^\{?[23]\}?)?\s*\.?"
)
_MARKS = "|".join(re.escape(mark) for mark in sorted(CURRENCIES, key=len, reverse=True))
_CURRENCY = re.compile(rf"(?P<sign>[-+]?)\s*\\?(?P<mark>{_MARKS})\s*(?=[-+\d.\\])")
# 5,00 \u20ac, as most of Europe writes sums of money.
_DECIMAL_COMMA = re.compile(
    rf"(?P<whole>(?<![\d.,])\d{{1,3}}(?:[. ]\d{{3}})*),(?P<cents>\d{{2}})(?P<mark>\s?(?:{_MARKS}|euros?))$"
)
_COMMANDS = {
    r"\texteuro": "\u20ac",
    r"\euro": "\u20ac",
    r"\pounds": "\u00a3",
    r"\Omega": "\u03a9",
    r"\mu ": "\u03bc",
    r"\mu\text{": r"\text{" + "\u03bc",
    r"\mu\mathrm{": r"\mathrm{" + "\u03bc",
}
# $2M; without the sign the letter may be a variable.
_SHORT_MAGNITUDE = re.compile(r"(?<=\d)\s?([kKMB])$")
_MAGNITUDE_OF = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion"}
# The unit s^{-1} of m s^{-1}.
_PER_POWER = re.compile(r"(?<=[A-Za-z])(?:\\[,;: ]|~|\s|\\cdot)+(?P<unit>[A-Za-z]+)\s*\^\s*\{?-(?P<power>[123])\}?")
_NUMERIC = re.compile(
    r"(?:\\(?:frac|times|cdot|div|overline|dot|bar)(?![A-Za-z])|[-+*/^().{}\d\s]|(?<=[\d)} ])x\s*(?=\d))+"
)
_SCIENTIFIC = re.compile(r"(?P<mantissa>[-+]?(?:\d+\.?\d*|\.\d+))[eE](?P<exponent>[-+]?\d+)")
_GROUPED = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?\d)")
# A word after a slash is a unit, a letter or two may be variables.
_PER = re.compile(r"^\s*/\s*(?=[A-Za-z]{3})")
_REPEATING = re.compile(
    r"(?P<whole>\d+)\.(?P<fixed>\d*)(?:\\(?:overline|dot|bar)\s*\{?(?P<repeated>\d+)\}?|\((?P<inside>\d+)\))"
)
_GOES_ON = re.compile(r"(\d+\.\d*?)(\d+?)((?:\2)+)(\d*)(?:\.\.\.|\s?\\[lc]?dots(?![A-Za-z]))")
# Thousands apart by an apostrophe or a low line, as in Switzerland and in Python; by points where a comma or several
# of them say that they are no decimals; in hundreds after the first thousand, as in India.
_SEPARATED = re.compile(r"(?<![\d.,])\d{1,3}(?:['\u2019_]\d{3})+(?![\d'\u2019_])")
_CONTINENTAL = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\.\d{3}){2,}(?:,\d+)?|\.\d{3},\d{1,2})(?![\d.,]*\d)")
_INDIAN = re.compile(r"(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?![\d,]*\d)")
_COMPOUND_PART = re.compile(r"(?P<number>\d[\d./]*(?: \d+/\d+)?)\s*(?P<unit>[A-Za-z]+)\.?")
# No second try at a part: the space between two may be either's, and n parts would take 2^n tries.
_COMPOUND = re.compile(
    rf"(?>{_COMPOUND_PART.pattern})(?>\s*+(?:,\s*+)?(?:and\s++)?\d[\d./]*+(?: \d+/\d+)?\s*+[A-Za-z]++\.?)++"
)
_TOKEN = re.compile(r"\s*(?:(?P<number>\d+\.?\d*|\.\d+)|(?P<sign>[-+*/^()]))")


@dataclass(frozen=True)
class Quantity:
    """An exact number and its unit, "" where none is given."""

    value: Fraction
    unit: str = ""
    certain: bool = True
    """Whether the unit is one for sure: the m of 5m may as well be a variable."""


def read_quantity(answer: str) -> Quantity | None:
    """The number that `answer` is, None if it is anything else: a list, a range, a formula, a sentence."""
    raw = strip_delimiters(plain_characters(answer))
    if len(raw) > _LONGEST:
        return None
    wrapped = _WRAPPED.fullmatch(raw)
    if wrapped:
        value = _value(tidy(wrapped["number"]))
        unit = re.sub(r"~|\\cdot(?![A-Za-z])", " ", wrapped["unit"])
        return _with_unit(value, unit + (wrapped["power"] or ""), wrapped=True)
    for command, mark in _COMMANDS.items():
        raw = raw.replace(command, mark)
    raw = _PER_POWER.sub(
        lambda match: f"/{match['unit']}" + (f"^{match['power']}" if match["power"] != "1" else ""), raw
    )
    raw = re.sub(r"^\\text\{\s*([^{}\w\s]+)\s*\}", r"\1", raw)
    raw = _DECIMAL_COMMA.sub(r"\g<whole>.\g<cents>\g<mark>", raw)
    currency = _CURRENCY.match(raw)
    if currency:
        amount = _SHORT_MAGNITUDE.sub(lambda match: f" {_MAGNITUDE_OF[match[1]]}", raw[currency.end() :])
        found = read_quantity(currency["sign"] + amount)
        unit = CURRENCIES[currency["mark"]]
        if found and found.unit.startswith("per "):
            return Quantity(found.value, f"{unit} {found.unit}")
        return Quantity(found.value, found.unit or unit) if found and found.unit in ("", unit) else None
    plain = local_digits(tidy(raw))
    scientific = _SCIENTIFIC.match(plain)
    if scientific:
        exponent = int(scientific["exponent"])
        value = _power(Fraction(10), exponent)
        scaled = Fraction(scientific["mantissa"]) * value if value is not None else None
        return _with_unit(scaled, plain[scientific.end() :], wrapped=False)
    numeric = _NUMERIC.match(plain)
    if not numeric:
        return None
    end = len(numeric[0].rstrip(" ^{").removesuffix("/"))
    return _with_unit(_value(plain[:end]), plain[end:], wrapped=False)


def same_quantity(gold: Quantity, said: Quantity) -> bool:
    """Whether two quantities are one: equal numbers, and no unit against another unit.

    A unit that only one side names is the one that the question asks for. 50 % is 0.5, and the 50 of a question for a
    percentage; of 1 % and less only the first, since 1 may be all of something.
    """
    if gold.unit and said.unit:
        if PERCENT in (gold.unit, said.unit):
            return gold == said
        return _in_base_units(gold) == _in_base_units(said) or (
            gold.value == said.value and frozenset((gold.unit, said.unit)) in _AMBIGUOUS
        )
    if PERCENT in (gold.unit, said.unit):
        percent, other = (gold, said) if gold.unit == PERCENT else (said, gold)
        return other.value == percent.value / 100 or (other.value == percent.value and abs(percent.value) > 1)
    return gold.value == said.value and gold.certain and said.certain


def _in_base_units(quantity: Quantity) -> tuple[Fraction, str]:
    """Value and unit in meters, grams, liters, seconds and dollars, as far as the unit is made of those."""
    value, units = quantity.value, []
    for place, part in enumerate(quantity.unit.split(" per ")):
        name, _, power = part.partition(" ^")
        unit, factor = _SCALES.get(name, (name, Fraction(1)))
        factor **= int(power or 1)
        value = value / factor if place else value * factor
        units.append(f"{unit} ^{power}" if power else unit)
    return value, " per ".join(units)


def _with_unit(value: Fraction | None, text: str, *, wrapped: bool) -> Quantity | None:
    """`value` in the unit that `text` names; None where `text` is no unit."""
    if value is None:
        return None
    apart = text.startswith(" ")
    text = _PER.sub("per ", text).strip().strip(".").strip()
    if not text:
        return Quantity(value)
    if text in CURRENCIES:
        return Quantity(value, CURRENCIES[text])
    if text == "\\degree":
        return Quantity(value, "degree")
    if re.match(r"\^?\s*\{?\s*\\circ", text):
        scale = re.sub(r"[\^{}\s]|\\circ", "", text)
        return Quantity(value, f"degree {scale.lower()}".strip()) if scale in ("", "C", "F") else None
    if text == PERCENT:
        return Quantity(value, PERCENT)
    if _SPACELESS.fullmatch(text):
        return Quantity(value, _spaceless_unit(text))
    if not re.fullmatch(r"[A-Za-z\u03bc\u03a9][A-Za-z\u03bc\u03a9\s.,/'-]*(?:\^\{?[23]\}?)?", text):
        return None
    words = re.sub(r"\^\{?([23])\}?", r" ^\1", text.replace("/", " per ").replace(".", "").replace(",", " ")).split()
    words = words[:-1] if words[-1:] == ["per"] else words
    while words and words[0].lower().rstrip("s") in MAGNITUDES:
        value *= MAGNITUDES[words.pop(0).lower().rstrip("s")]
    lowered = [part for word in words for part in SI_UNITS.get(word, word.lower()).split()]
    if len(words) > _MOST_UNIT_WORDS or set(lowered) & _NO_UNIT or lowered[:1] in (["squared"], ["cubed"]):
        return None
    short = [word for word in lowered if len(word) <= 3 and word not in UNITS | {"in"} and not word.startswith("^")]
    if lowered and not wrapped and len(lowered[0]) <= 3 and lowered[0] in short:
        return None
    certain = wrapped or apart or not lowered or len(lowered[0]) > 1
    return Quantity(value, _unit_name(" ".join(lowered)), certain)


def _spaceless_unit(text: str) -> str:
    """A unit in a script without spaces, without a sentence's end."""
    for end in _SENTENCE_ENDS:
        text = text.removesuffix(end)
    counted = next((text.removeprefix(counter) for counter in _COUNTERS if text.startswith(counter)), text)
    return _ALIASES.get(counted, counted)


def _unit_name(text: str) -> str:
    words = []
    for word in text.split():
        single = word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
        words += _ALIASES.get(word, _ALIASES.get(single, single)).split()
    name = " ".join(words)
    name = re.sub(r"^(square|cubic) (\w+)", lambda m: f"{m[2]} ^{2 if m[1] == 'square' else 3}", name)
    return re.sub(r" (squared|cubed)$", lambda m: f" ^{2 if m[1] == 'squared' else 3}", name)


def _value(text: str) -> Fraction | None:
    """The value of a sum, product, fraction or mixed number."""
    text = _GROUPED.sub(lambda match: match[0].replace(" ", ""), local_digits(text.strip()))
    text = _GOES_ON.sub(_spell_period, text)
    text = _REPEATING.sub(_spell_repeating, text)
    for _ in range(8):
        spelled = re.sub(
            r"(?P<whole>\d*)\s*\\frac\s*(?:\{(?P<a>[^{}]*)\}|(?P<c>\d))\s*(?:\{(?P<b>[^{}]*)\}|(?P<d>\d))",
            _spell_fraction,
            text,
        )
        if spelled == text:
            break
        text = spelled
    text = re.sub(r"(?<![\d./^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d./^])", r"(\1+\2/\3)", text)
    text = re.sub(r"\\(?:times|cdot)\s*|\s+x\s+|(?<=\d)x(?=\d)", "*", text).replace("\\div", "/")
    text = text.replace("{", "(").replace("}", ")")
    tokens = _tokens(text)
    if not tokens:
        return None
    try:
        value, end = _sum(tokens, 0)
    except (ArithmeticError, IndexError, ValueError):
        return None
    return value if end == len(tokens) else None


def _spell_repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as the fraction that it is: (16 - 1) / 90."""
    fixed, repeated = match["fixed"], match["repeated"] or match["inside"]
    above = int(match["whole"] + fixed + repeated) - int(match["whole"] + fixed)
    return f"({above}/{'9' * len(repeated)}{'0' * len(fixed)})"


def _spell_period(match: re.Match[str]) -> str:
    """`0.1666...` as `0.1(6)`; what follows the last whole period must be the beginning of one."""
    before, period, _, rest = match.groups()
    return f"{before}({period})" if period.startswith(rest) else match[0]


def local_digits(text: str) -> str:
    """`text` with numbers of other conventions in digits and one point: `1.234.567,8`, `12,34,567`, `1'234`."""
    text = _SEPARATED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _INDIAN.sub(lambda match: match[0].replace(",", ""), text)
    return _CONTINENTAL.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)


def read_compound(text: str) -> Quantity | None:
    """The sum of a quantity said in several units, larger ones first: `2 hours and 30 minutes`, `5'6"`; else None."""
    text = tidy(text)
    text = re.sub(r"(\d)\s?h\s?(\d+)\s?m(?:in)?$", r"\1 hours \2 minutes", text)
    text = re.sub(r"(\d+)'\s*(\d+)(?:\"|'')", r"\1 feet \2 inches", text)
    if not _COMPOUND.fullmatch(text):
        return None
    parts: list[tuple[Fraction, Fraction, str]] = []
    for part in _COMPOUND_PART.finditer(text):
        name, value = _unit_name(part["unit"].lower()), _value(part["number"])
        unit, factor = _SCALES.get(name, (name, Fraction(1)))
        if value is None or (parts and (unit != parts[-1][2] or factor >= parts[-1][1])):
            return None
        parts.append((value, factor, unit))
    return Quantity(sum((value * factor for value, factor, _ in parts), Fraction(0)), parts[0][2])


def _spell_fraction(match: re.Match[str]) -> str:
    above, below = match["a"] or match["c"] or "", match["b"] or match["d"] or ""
    whole = match["whole"]
    return f"({whole}+({above})/({below}))" if whole else f"(({above})/({below}))"


def _tokens(text: str) -> list[str] | None:
    tokens, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        tokens.append(match["number"] or match["sign"])
        position = match.end()
    return tokens


def _sum(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at)
    while at < len(tokens) and tokens[at] in "+-":
        other, end = _product(tokens, at + 1)
        value, at = (value + other, end) if tokens[at] == "+" else (value - other, end)
    return value, at


def _product(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if tokens[at] in ("+", "-"):
        value, end = _product(tokens, at + 1)
        return (-value if tokens[at] == "-" else value), end
    value, at = _factor(tokens, at)
    while at < len(tokens) and tokens[at] in "*/":
        sign = tokens[at + 1] == "-"
        other, end = _factor(tokens, at + 1 + sign)
        other = -other if sign else other
        value, at = (value * other, end) if tokens[at] == "*" else (value / other, end)
    return value, at


def _factor(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1)
        if tokens[at] != ")":
            raise ValueError("unbalanced")
        at += 1
    else:
        value, at = Fraction(tokens[at]), at + 1
    if at < len(tokens) and tokens[at] == "^":
        sign = tokens[at + 1] == "-"
        exponent, at = _factor(tokens, at + 1 + sign)
        power = _power(value, -int(exponent) if sign else int(exponent)) if exponent.denominator == 1 else None
        if power is None:
            raise ValueError("no exact power")
        value = power
    return value, at


def _power(base: Fraction, exponent: int) -> Fraction | None:
    if abs(exponent) > _LARGEST_EXPONENT or max(abs(base.numerator), base.denominator).bit_length() > 512:
        return None
    return base**exponent
