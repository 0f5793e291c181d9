r"""Sets of real numbers, `[1,2] \cup [2,3]` or `x > 0, x \ne 1`: equal where they hold the same numbers.

Two sets are laid on one grid, the ends of all their intervals in order, and compared point by point and gap by gap.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from finemill.metrics.intervals import as_interval
from finemill.metrics.lists import brackets_of, split_outside

Order = Callable[[str, str], int | None]
"""-1, 0 or 1 as the first number is less than the second, equal to it or more; None where that cannot be told."""

_UNION = r"\\cup(?![A-Za-z])"
_INTERSECTION = r"\\cap(?![A-Za-z])"
_WITHOUT = r"\\(?:setminus|backslash)(?![A-Za-z])|\\(?=\s+\\?\{|\\\{)|-(?=\s*\\?\{)"
_AND = r"(?:\\text\{\s*)?\b(?:and|but)\b(?:\s*\})?"
_ALL_HOLD = rf",\s*{_AND}|,|{_AND}|\\land(?![A-Za-z])"
_RELATION = re.compile(r"[<>]|\\(?:[lg](?:eq?|t)|neq?)(?![A-Za-z])|!=")
_REAL = re.compile(r"[A-Za-z]\s*\\in\s*\\mathbb\s*\{?R\}?")
_INTERVAL = re.compile(r"[\[(].*[\])]", re.DOTALL)
# What is no tuple, list or set of points.
_EVIDENT = re.compile(rf"{_UNION}|{_INTERSECTION}|{_WITHOUT}|\\infty|^\[[^\[\]]*\)$|^\([^()]*\]$|{_RELATION.pattern}")
_LOWEST, _HIGHEST = r"-\infty", r"\infty"
_MOST_ENDS = 16

Atoms = frozenset[int]
"""Points and gaps of a grid: 0 is what lies below its first point, 1 that point, 2 the gap above it, and so on."""


@dataclass(frozen=True)
class _Interval:
    low: str
    high: str
    closed: tuple[bool, bool]


@dataclass(frozen=True)
class _Combined:
    kind: str
    parts: "tuple[_Region, ...]"


_Region = _Interval | _Combined


def same_region(gold: str, said: str, order: Order) -> bool | None:
    """Whether two texts are the same set of real numbers; None where one is none for sure, or ends have no order."""
    regions = _read(gold), _read(said)
    evident = any(_EVIDENT.search(text) or as_interval(text) for text in (gold, said))
    if regions[0] is None or regions[1] is None or not evident:
        return None
    grid = _grid({end for region in regions if region for end in _ends(region)}, order)
    if grid is None:
        return None
    atoms = _atoms(regions[0], grid), _atoms(regions[1], grid)
    return None if None in atoms else atoms[0] == atoms[1]


def _read(text: str) -> _Region | None:
    conditions = [part for part in split_outside(text, _ALL_HOLD) if not _REAL.fullmatch(part)]
    if len(conditions) == 1:
        text = conditions[0]
    elif all(map(_RELATION.search, conditions)):
        letters = {letter for part in conditions for letter in re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", part)}
        return _combined("all", conditions) if len(letters) == 1 else None
    text = as_interval(text) or text.strip()
    for kind, separator in (("union", _UNION), ("all", _INTERSECTION), ("without", _WITHOUT)):
        parts = split_outside(text, separator)
        if len(parts) > 1:
            return _combined(kind, parts)
    brackets, inner = brackets_of(text)
    if brackets == "{}":
        points = tuple(_Interval(point, point, (True, True)) for point in split_outside(inner, "[,;]") if point)
        return _Combined("union", points)
    ends = split_outside(inner, "[,;]") if brackets and _INTERVAL.fullmatch(text) else []
    if len(ends) != 2 or not all(ends):
        return None
    return _Interval(ends[0], ends[1], (brackets[0] == "[", brackets[1] == "]"))


def _combined(kind: str, parts: Sequence[str]) -> _Combined | None:
    read = [_read(part) for part in parts]
    return _Combined(kind, tuple(part for part in read if part)) if all(read) else None


def _ends(region: _Region) -> Iterator[str]:
    if isinstance(region, _Combined):
        for part in region.parts:
            yield from _ends(part)
    else:
        yield from (_plain(end) for end in (region.low, region.high))


def _plain(end: str) -> str:
    return re.sub(r"^\+\s*|(?<=-)\s+", "", end.strip()).strip()


def _grid(ends: set[str], order: Order) -> dict[str, int] | None:
    """The place of every end among all of them, equal ones at one; None where two have no order."""
    finite = sorted(ends - {_LOWEST, _HIGHEST})
    if len(finite) > _MOST_ENDS:
        return None
    orders = {(one, other): order(one, other) if one != other else 0 for one in finite for other in finite}
    if None in orders.values():
        return None
    # As many others lie below a number as its place tells.
    finite = sorted(finite, key=lambda end: sum(orders[other, end] == -1 for other in finite))
    places: dict[str, int] = {}
    for before, end in zip([None, *finite], finite, strict=False):
        same = before is not None and orders[before, end] == 0
        places[end] = places[before] + (0 if same else 2) if before is not None else 1
    top = max(places.values(), default=-1) + 2
    return places | {_LOWEST: -1, _HIGHEST: top}


def _atoms(region: _Region, grid: dict[str, int]) -> Atoms | None:
    """The points and gaps of a set; None for an interval from a number to a lower one."""
    if isinstance(region, _Interval):
        low, high = grid[_plain(region.low)], grid[_plain(region.high)]
        closed = all(region.closed)
        if low > high or (low == high and not closed):
            return None
        infinite = low == -1, high == grid[_HIGHEST]
        first = low if region.closed[0] and not infinite[0] else low + 1
        last = high if region.closed[1] and not infinite[1] else high - 1
        return frozenset(range(first, last + 1))
    parts = [_atoms(part, grid) for part in region.parts]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if region.kind == "union":
        return frozenset().union(*known)
    if region.kind == "all":
        # x < 1, x > 3: whoever writes that means "or".
        return frozenset.intersection(*known) or None
    return known[0].difference(*known[1:])
