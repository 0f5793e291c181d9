"""Rules that an answer's form keeps or breaks: a JSON schema, a regular expression."""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from finemill.errors import UserError
from finemill.rows.answers import after_thinking

PATTERN_TIMEOUT_S = 1.0
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(?P<inside>.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


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
    return bool(_validator(schema).is_valid(value))


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
    _validator(text)
    return text


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
    except ImportError:
        raise UserError(
            "a JSON schema is checked by jsonschema, which is not installed: pip install 'finemill[eval]'"
        ) from None
    try:
        value = json.loads(schema)
        found = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
        found.check_schema(value)
    except (ValueError, jsonschema.SchemaError) as error:
        raise UserError(f"no JSON schema: {' '.join(str(error).split())[:200]}") from None
    # What a schema says of a date or an address is meant, though the standard leaves it open.
    return found(value, format_checker=found.FORMAT_CHECKER)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that JSON's readers can hold")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
