"""Rules that an answer's form keeps or breaks: a JSON schema, a regular expression."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from finemill.errors import UserError
from finemill.metrics.schemas import PATTERN_TIMEOUT_S, check_schema, keeps
from finemill.rows.answers import after_thinking

_FENCE = re.compile(r"\s*(?P<mark>```|~~~)(?:json)?\s+(?P<inside>.*?)\n?\s*(?P=mark)\s*", re.DOTALL | re.IGNORECASE)


def keeps_schema(text: str, schema: str) -> bool:
    """Whether the answer in `text` is JSON, bare or as one fenced block, that keeps the JSON schema in `schema`.

    Raises: UserError: `schema` is no JSON schema.
    """
    answer = after_thinking(text)
    fence = _FENCE.fullmatch(answer)
    try:
        value = json.loads(fence["inside"] if fence else answer, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return False
    return keeps(value, schema)


def keeps_pattern(text: str, pattern: str) -> bool:
    """Whether the whole answer in `text` matches the regular expression `pattern`, outer white space left out.

    What cannot be told within `PATTERN_TIMEOUT_S` is no match: `(a+)+b` may take forever.
    Raises: UserError: `pattern` is no regular expression.
    """
    import regex

    try:
        return regex.fullmatch(pattern, after_thinking(text), regex.DOTALL, timeout=PATTERN_TIMEOUT_S) is not None
    except regex.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    except TimeoutError:
        return False


def read_schema(schema: Mapping[str, Any] | str) -> str:
    """A JSON schema as text. Raises: UserError: it is none."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    check_schema(text)
    return text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that JSON's readers can hold")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
