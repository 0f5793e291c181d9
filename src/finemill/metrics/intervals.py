r"""An inequality in one variable, or a name for a set of numbers, as the interval that it stands for."""

import itertools
import re

_BELOW = r"\\leq?(?![A-Za-z])|\\lt(?![A-Za-z])|<=|<"
_ABOVE = r"\\geq?(?![A-Za-z])|\\gt(?![A-Za-z])|>=|>"
_SIGN = re.compile(rf"\s*({_BELOW}|{_ABOVE})\s*")
_INFINITE = {"below": r"-\infty", "above": r"\infty"}


_NAMES_OF_REALS = (
    r"\\mathbb\s*\{?R\}?",
    r"\\R",
    "\u211d",
    r"(?:the\s+set\s+of\s+)?(?:all\s+)?(?:the\s+)?real\s+numbers?",
    r"\\text\{\s*all real numbers\s*\}",
    "all reals",
)
_REALS = re.compile(
    rf"(?:{'|'.join(_NAMES_OF_REALS)})"
    r"(?:\s*(?:\\setminus|\\backslash|-|except)\s*(?:\\?\{)?\s*(?P<without>[^{}\\]+?)\s*(?:\\?\})?)?",
    re.IGNORECASE,
)
_UNEQUAL = re.compile(r"[A-Za-z]\s*(?:\\neq?(?![A-Za-z])|!=)\s*(?P<without>[^=<>]+)")
_ABSOLUTE = re.compile(
    r"(?:\||\\lvert\s*)\s*[A-Za-z]\s*(?:(?P<minus>[-+])\s*(?P<centre>[\d./]+)\s*)?(?:\||\\rvert)"
    rf"\s*(?P<sign>{_BELOW}|{_ABOVE})\s*(?P<edge>[^<>=|]*[^<>=|\s])\s*"
)
_VARIABLE = re.compile(r"[A-Za-z]|\\(?:theta|alpha|beta|gamma|phi|varphi|lambda|mu|omega)")
_EITHER = re.compile(r"\s*(?:\\text\{\s*or\s*\}|\\lor(?![A-Za-z])|\bor\b|\u2228)\s*")
# `\{x \mid x > 2\}`: the values of a letter for which an inequality holds.
_BUILT = re.compile(
    r"\\?\{\s*(?P<letter>[A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid(?![A-Za-z])|\||:)\s*(?P<holds>.*?)\s*\\?\}"
)
_OTHER_BRACKETS = re.compile(r"(?P<left>[\]\[])(?P<inside>[^\[\]]+)(?P<right>[\[\]])")


def as_interval(text: str) -> str | None:
    r"""The interval of an inequality about one letter, of $\mathbb{R}$ without points, of `]1, 3[`; None for all else.

    `-1 < x \le 3` is `(-1, 3]`, `x \ne 0` is `(-\infty, 0) \cup (0, \infty)`, `x < 2 or x > 3` a union, too, and
    `\{x \mid x > 2\}` is `(2, \infty)`.
    """
    text = text.strip()
    built = _BUILT.fullmatch(text)
    if built and built["letter"] in built["holds"]:
        return as_interval(built["holds"])
    parts = _EITHER.split(text)
    if len(parts) > 1:
        intervals = [_of_inequality(part) for part in parts]
        return r" \cup ".join(map(str, intervals)) if all(intervals) else None
    without = _UNEQUAL.fullmatch(text) or _REALS.fullmatch(text)
    if without:
        return _without(without["without"])
    open_ended = _OTHER_BRACKETS.fullmatch(text)
    if open_ended and (open_ended["left"], open_ended["right"]) != ("[", "]"):
        left, right = ("(" if open_ended["left"] == "]" else "["), (")" if open_ended["right"] == "[" else "]")
        return f"{left}{open_ended['inside']}{right}"
    absolute = _ABSOLUTE.fullmatch(text)
    if absolute:
        return _of_absolute(absolute)
    return _of_inequality(text)


def _of_absolute(match: re.Match[str]) -> str:
    """`|x - 1| < 2` is (-1, 3), and `|x| > 1` a union."""
    centre = f"{'-' if match['minus'] == '+' else ''}({match['centre']})" if match["centre"] else "0"
    low, high = f"{centre}-({match['edge']})", f"{centre}+({match['edge']})"
    strict = _is_strict(match["sign"])
    if _is_below(match["sign"]):
        return f"{'(' if strict else '['}{low}, {high}{')' if strict else ']'}"
    left, right = (")", "(") if strict else ("]", "[")
    return rf"(-\infty, {low}{left} \cup {right}{high}, \infty)"


def _without(points: str | None) -> str:
    edges = [r"-\infty", *(points.split(",") if points else ()), r"\infty"]
    return r" \cup ".join(f"({low.strip()}, {high.strip()})" for low, high in itertools.pairwise(edges))


def _of_inequality(text: str) -> str | None:
    parts = [part.strip() for part in _SIGN.split(text)]
    if len(parts) == 3:
        left, sign, right = parts
        if _is_variable(right):
            left, right, sign = right, left, _mirrored(sign)
        # `\ge 4`, without a letter, is a bound of what is asked for.
        if not (_is_variable(left) or not left) or not right:
            return None
        edge = "" if _is_strict(sign) else "="
        if _is_below(sign):
            return f"({_INFINITE['below']}, {right}{']' if edge else ')'}"
        return f"{'[' if edge else '('}{right}, {_INFINITE['above']})"
    if len(parts) == 5 and _is_variable(parts[2]) and parts[0] and parts[4]:
        low, first, _, second, high = parts
        if _is_below(first) != _is_below(second):
            return None
        if not _is_below(first):
            low, first, second, high = high, _mirrored(second), _mirrored(first), low
        return f"{'(' if _is_strict(first) else '['}{low}, {high}{')' if _is_strict(second) else ']'}"
    return None


def _is_variable(text: str) -> bool:
    return _VARIABLE.fullmatch(text.strip()) is not None


def _is_strict(sign: str) -> bool:
    return sign in ("<", ">", "\\lt", "\\gt")


def _is_below(sign: str) -> bool:
    return re.fullmatch(_BELOW, sign) is not None


def _mirrored(sign: str) -> str:
    if _is_strict(sign):
        return ">" if _is_below(sign) else "<"
    return ">=" if _is_below(sign) else "<="
