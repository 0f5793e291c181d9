r"""Ratios, `6:8` or `1 : \sqrt{2} : 3`, by their parts: equal where every two parts have the same quotient."""

import re
from collections.abc import Callable, Sequence

_COLON = re.compile(r"\s*(?:\\colon(?![A-Za-z])|:)\s*")
_PART = re.compile(r"(?!0\d)(?:\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+|[{}()+*/^_ -])+")
_CLOCK = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?")
_FRACTION = re.compile(r"\\[dt]?frac(?![A-Za-z])|/")


def read_ratio(text: str) -> tuple[str, ...] | None:
    """The parts of a ratio, None for any other text."""
    parts = _COLON.split(text.strip())
    return tuple(parts) if len(parts) > 1 and all(map(_PART.fullmatch, parts)) else None


def may_be_time(text: str) -> bool:
    """Whether a ratio has the form of a time of day: `5:10`, and not `5:1`."""
    return _CLOCK.fullmatch(text.strip()) is not None


def is_fraction(text: str) -> bool:
    """Whether `text` is written as a fraction."""
    return _FRACTION.search(text) is not None


def same_ratio(gold: Sequence[str], said: Sequence[str], equal: Callable[[str, str], bool]) -> bool:
    """Whether the parts of two ratios are in the same proportion; `equal` compares two formulas."""
    if len(gold) != len(said):
        return False
    if all(equal(*pair) for pair in zip(gold, said, strict=True)):
        return True
    if any(equal(part, "0") for part in (*gold, *said)):
        return False
    first, other = gold[0], said[0]
    return all(
        equal(f"({part})*({other})", f"({another})*({first})") for part, another in zip(gold[1:], said[1:], strict=True)
    )
