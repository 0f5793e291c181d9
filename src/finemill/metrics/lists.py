"""Several answers in one: the elements of a set, tuple, interval, vector or list."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finemill.metrics.matrices import Matrix, as_vector
from finemill.rows.formulas import tidy

_EMPTY = re.compile(
    r"\\emptyset|\\varnothing|\\\{\s*\\\}|\u2205|(?:the\s+)?empty\s+set"
    r"|(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+)?(?:solutions?|roots?)(?:\s+exists?)?",
    re.IGNORECASE,
)
SEPARATOR = (
    r",\s*(?:\\text\{\s*)?(?:and|or)\b(?:\s*\})?|[,;]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\lor(?![A-Za-z])"
)
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_THOUSANDS = re.compile(r"[-+]?\s*\\?\$?\s*\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]*,\d)\D*")
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Collection:
    """Several answers in one: `brackets` is "()", "[)", ..., or "" for those whose order does not matter."""

    brackets: str
    items: tuple[str, ...]


def read_collection(text: str, matrices: Sequence[Matrix | None] = (None, None)) -> Collection | None:
    """The elements of a set, tuple, interval, vector or list; None for one answer.

    Args:
        matrices: what `text` is as a matrix, and what the answer beside it is: beside a vector `[1, 2]` is one, too.
    """
    matrix, other = matrices
    if matrix is not None:
        vector = as_vector(matrix)
        return Collection("()", vector) if vector else None
    if _EMPTY.fullmatch(tidy(text)) or _EMPTY.fullmatch(text):
        return Collection("", ())
    brackets, inner = brackets_of(text)
    if not brackets:
        if _THOUSANDS.fullmatch(text) and ", " not in text:
            return None
        parts = [one for part in split_outside(text, SEPARATOR) if part for one in _both_signs(part)]
        return Collection("", tuple(parts)) if len(parts) > 1 else None
    spaced = ", " in inner and bool(re.search(r"\d,\d{3}(?!\d)", inner))
    parts = split_outside(inner, r",\s|;" if spaced else r"[,;]")
    if len(parts) == 1 and brackets != "{}":
        return None
    if brackets == "{}":
        return Collection("", tuple(one for part in parts for one in _both_signs(part)))
    return Collection("()" if other and brackets == "[]" else brackets, tuple(parts))


def _both_signs(text: str) -> tuple[str, ...]:
    r"""`1 \pm \sqrt{2}` as two answers."""
    if len(_PLUS_MINUS.findall(text)) != 1:
        return (text,)
    return _PLUS_MINUS.sub("+", text), _PLUS_MINUS.sub("-", text)


def brackets_of(text: str) -> tuple[str, str]:
    """The brackets around all of `text` and what they hold."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{}", text[2:-2]
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return "", text
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return (text[0] + text[-1], text[1:-1]) if position == len(text) - 1 else ("", text)
    return "", text


def split_outside(text: str, separator: str) -> list[str]:
    """Parts of `text` between separators outside all brackets."""
    parts, depth, begin = [], 0, 0
    pattern = re.compile(separator)
    position = 0
    while position < len(text):
        if text[position] in _OPEN:
            depth += 1
        elif text[position] in _CLOSE:
            depth -= 1
        elif depth == 0 and (match := pattern.match(text, position)):
            parts.append(text[begin:position])
            begin = position = match.end()
            continue
        position += 1
    return [part.strip() for part in [*parts, text[begin:]]]


def elements(part: str) -> list[str]:
    """The elements of a set, the intervals of a list of them; all else is one."""
    brackets, inner = brackets_of(part)
    if brackets == "{}":
        return split_outside(inner, "[,;]")
    listed = split_outside(part, SEPARATOR)
    return listed if all(brackets_of(one)[0] for one in listed) else [part]
