"""Single values of raw rows: what counts as missing, as text, and as JSON in a text."""

import ast
import json
import math
import re
import warnings
from typing import Any

from finemill.rows.reasons import DroppedRowError

# Objects as Python prints them, which pandas writes into CSV files.
_PYTHON = re.compile(r"\[?\s*\{\s*'")

_YES_OR_NO = {
    **dict.fromkeys(("true", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "n", "0", "0.0"), False),
}
_LONGEST_FLAG = 16


def is_missing(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, an empty or blank text, an empty list or object."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)


def holds_nothing(value: Any) -> bool:
    """Whether a value says nothing at any depth: Arrow's tables give a row the keys and lists of all others."""
    if isinstance(value, dict):
        return all(map(holds_nothing, value.values()))
    return all(map(holds_nothing, value)) if isinstance(value, list) else is_missing(value)


def as_text(value: Any, field: str = "") -> str:
    """A text as it is, a number as Python writes it. Raises: DroppedRowError: anything else, in `field`."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DroppedRowError("not_text", field)


def is_true(value: Any) -> bool | None:
    """What a value that stands for yes or no says, in the spellings of JSON, CSV and Python; None for other values."""
    if isinstance(value, str):
        return _YES_OR_NO.get(value.strip().lower()) if len(value) < _LONGEST_FLAG else None
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def parse_json(value: Any) -> Any:
    """Lists and objects for a text that holds them as JSON, or as Python writes them; other values as they are."""
    if not isinstance(value, str) or (text := value.strip())[:1] not in ("[", "{") or text[-1:] not in ("]", "}"):
        return value
    try:
        return json.loads(text)
    except ValueError:
        return _parse_python(text) if _PYTHON.match(text) else value


def _parse_python(text: str) -> Any:
    with warnings.catch_warnings():
        # Of escapes that Python does not know.
        warnings.simplefilter("ignore")
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError):
            return text
