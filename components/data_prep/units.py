"""A text as units that can be compared in any script: words, and single letters where there are no spaces."""

import re
from collections.abc import Iterator, Sequence

# Thai, Lao, Burmese and Khmer; Japanese and Chinese. Korean has spaces.
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNIT = re.compile(f"[{_NO_SPACES}]|[^\\s{_NO_SPACES}]+")


def units_of(text: str) -> list[str]:
    """The units of a text in order."""
    return text.split() if text.isascii() else _UNIT.findall(text)


def runs_of(units: Sequence[str], length: int) -> Iterator[str]:
    """Every run of `length` units, joined by spaces; all of them where there are fewer."""
    for start in range(max(1, len(units) - length + 1)):
        yield " ".join(units[start : start + length])
