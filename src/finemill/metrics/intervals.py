r"""An inequality in one variable as the interval that it stands for: `-1 < x \le 3` is `(-1, 3]`."""

import re

_BELOW = r"\\leq?(?![A-Za-z])|\\lt(?![A-Za-z])|<=|<"
_ABOVE = r"\\geq?(?![A-Za-z])|\\gt(?![A-Za-z])|>=|>"
_SIGN = re.compile(rf"\s*({_BELOW}|{_ABOVE})\s*")
_INFINITE = {"below": r"-\infty", "above": r"\infty"}


def as_interval(text: str) -> str | None:
    """The interval of a plain or double inequality about one letter; None for any other text."""
    parts = _SIGN.split(text.strip())
    if len(parts) == 3:
        left, sign, right = parts
        if _is_variable(right):
            left, right, sign = right, left, _mirrored(sign)
        if not _is_variable(left) or not right:
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
    return re.fullmatch(r"[A-Za-z]", text.strip()) is not None


def _is_strict(sign: str) -> bool:
    return sign in ("<", ">", "\\lt", "\\gt")


def _is_below(sign: str) -> bool:
    return re.fullmatch(_BELOW, sign) is not None


def _mirrored(sign: str) -> str:
    if _is_strict(sign):
        return ">" if _is_below(sign) else "<"
    return ">=" if _is_below(sign) else "<="
