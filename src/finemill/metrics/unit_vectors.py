r"""Vectors as sums of unit vectors, `2\mathbf{i} + 3\mathbf{j}`, by their components."""

import re
from collections.abc import Mapping

_AXES = "ijk"
_TERM = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<factor>.*?)\s*(?:\\cdot|\*)?\s*(?:\\mathbf\{(?P<bold>[ijk])\}|(?P<plain>(?<![A-Za-z])[ijk]))"
)
_OPEN, _CLOSE = "([{", ")]}"


def read_unit_vector(text: str) -> Mapping[str, str] | None:
    """The components by axis, without those that are not named; None for any other text.

    Bare letters are axes only where there are two or more of them: `5i` is a number.
    """
    found: dict[str, str] = {}
    plain = False
    for term in _terms(text.strip()):
        match = _TERM.fullmatch(term)
        axis = (match["bold"] or match["plain"]) if match else None
        if (
            not match
            or axis is None
            or axis in found
            or re.search(r"(?<![\\A-Za-z])[ijk](?![A-Za-z])", match["factor"])
        ):
            return None
        plain = plain or match["plain"] is not None
        found[axis] = f"{match['sign'].removeprefix('+')}{match['factor'] or '1'}"
    return None if not found or (plain and len(found) < 2) else found


def components(vector: Mapping[str, str], dimensions: int) -> tuple[str, ...] | None:
    """The components along all axes of a space; None where a vector has more."""
    if any(_AXES.index(axis) >= dimensions for axis in vector):
        return None
    return tuple(vector.get(axis, "0") for axis in _AXES[:dimensions])


def _terms(text: str) -> list[str]:
    """The terms of a sum, each with its sign."""
    terms, depth, begin = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character in "+-" and depth == 0 and text[begin:position].strip():
            terms.append(text[begin:position].strip())
            begin = position
    return [*terms, text[begin:].strip()]
