r"""Angles in degrees inside of formulas, `\sin 30^\circ`, in radians."""

import re

_NUMBER = r"\d+(?:\.\d+)?|\\frac\s*\{\d+\}\s*\{\d+\}|\([^()]*\)|[A-Za-z]"
_DEGREES = re.compile(
    rf"(?P<angle>{_NUMBER})\s*(?:\^\s*(?:\{{\s*\\circ\s*\}}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z]))"
)
_WORD = re.compile(rf"(?P<angle>{_NUMBER})\s*(?:\\text\s*\{{\s*)?degrees?(?:\s*\}})?$")
_RADIANS = re.compile(r"\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?<![A-Za-z])rad(?:ian)?s?(?:\s*\})?$")
_MINUTES = re.compile(
    r"(?P<degrees>\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*(?P<minutes>\d{1,2})\s*(?:'|\^\s*\{?\\prime\}?)"
    r"(?:\s*(?P<seconds>\d{1,2})\s*(?:''|\"|\^\s*\{?\\prime\\prime\}?))?"
)


def has_degrees(text: str) -> bool:
    """Whether an angle in degrees is anywhere in `text`."""
    return _DEGREES.search(text) is not None or _WORD.search(text) is not None


def in_radians(text: str) -> str:
    r"""A formula with its angles in radians: `\sin 30^\circ` as `\sin (30*\frac{\pi}{180})`."""
    text = _RADIANS.sub("", text)
    for pattern in (_DEGREES, _WORD):
        text = pattern.sub(r"(\g<angle>*\\frac{\\pi}{180})", text)
    return text


def without_minutes(text: str) -> str:
    r"""`30^\circ 30'` as `(61/2)^\circ`; other texts as they are."""
    match = _MINUTES.fullmatch(text.strip())
    if not match:
        return text
    seconds = 3600 * int(match["degrees"]) + 60 * int(match["minutes"]) + int(match["seconds"] or 0)
    return f"({seconds}/3600)^\\circ"
