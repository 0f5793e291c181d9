"""One spelling for the characters that numbers and formulas are written with in the world's texts."""

import re
import unicodedata

from finemill.rows.numerals import signs_in_digits

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00d7\u2715\u22c5\u00b7\u2219", "*"),
        **dict.fromkeys("\u00f7\u2044\u2215\uff0f", "/"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " "),
        **dict.fromkeys("\uff0e\u3002", "."),
        **dict.fromkeys("\uff0c\u3001\u066c", ","),
        "\u066b": ".",
        "\uff05": "%",
        "\u066a": "%",
        "\uff08": "(",
        "\uff09": ")",
        "\uff1a": ":",
        "\uff1b": ";",
        "\uff1d": "=",
        "\uff0b": "+",
        "\uff04": "$",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u00b1": r"\pm ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u222a": r"\cup ",
        "\u2208": r"\in ",
        "\u00b0": r"^\circ ",
        "\u2248": r"\approx ",
        "\u2126": "\u03a9",
        "\u00b5": "\u03bc",
        "\u2026": "...",
        "\uffe5": "\u00a5",
        "\u27e8": r"\langle ",
        "\u27e9": r"\rangle ",
    }
)
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_SUBSCRIPTS = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"
_LOGARITHM = re.compile(rf"(?<![\\A-Za-z])log(?=[{_SUBSCRIPTS}])")
_SUNK = re.compile(f"[{_SUBSCRIPTS}]+")
_VULGAR_FRACTION = re.compile("(?P<whole>\\d?)(?P<sign>[\u00bc-\u00be\u2150-\u215e])")
_ROOT = re.compile("\u221a(?:(?P<plain>\\d+|[a-z])|(?=\\())")
_OVERLINED = re.compile("(?:\\d\u0305)+")
_CIRCLED = re.compile("[\u2460-\u2473]")
# The space of 1 000 where it is one that does not break a line: an ordinary one may stand between two numbers.
_THIN_GROUPS = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")


def plain_characters(text: str) -> str:
    """`text` with ASCII digits, signs and punctuation, roots, powers and fractions as formulas; letters as they are."""
    if text.isascii():
        return text
    text = _THIN_GROUPS.sub("", text)
    text = _OVERLINED.sub(lambda match: f"\\overline{{{match[0].replace(chr(0x305), '')}}}", text)
    text = _CIRCLED.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _VULGAR_FRACTION.sub(_spell_fraction, text)
    text = _RAISED.sub(lambda match: "^{" + _lowered(match[0]) + "}", text)
    text = _LOGARITHM.sub(r"\\log", text)
    text = _SUNK.sub(lambda match: "_{" + _lowered(match[0]) + "}", text)
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match['plain']}}}" if match["plain"] else r"\sqrt", text)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return signs_in_digits(text.translate(_SIGNS))


def _spell_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match["sign"]).partition("\u2044")
    return f"{match['whole']}{' ' if match['whole'] else ''}{numerator}/{denominator}"


def _lowered(raised: str) -> str:
    return unicodedata.normalize("NFKC", raised).replace("\u2212", "-")
