"""JSON schemas: read once, their references and patterns checked before the first answer."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from finemill.errors import UserError

PATTERN_TIMEOUT_S = 1.0
_DATE_TIME = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})[Tt](?P<time>.+)", re.ASCII)
_TIME = re.compile(r"(?P<clock>\d{2}:\d{2}:)(?P<second>\d{2})(?P<rest>(?:\.\d+)?(?:[Zz]|[-+]\d{2}:\d{2}))", re.ASCII)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?:[A-Za-z0-9._~:/?#@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})*")


def keeps(value: Any, schema: str) -> bool:
    """Whether a JSON value keeps a schema. Raises: UserError: the schema is none, or refers to what is not in it."""
    from referencing.exceptions import Unresolvable

    try:
        return bool(_validator(schema).is_valid(value))
    except Unresolvable as error:
        raise UserError(f"the JSON schema refers to what it does not hold: {error}") from None
    except RecursionError:
        raise UserError("the JSON schema refers to itself without end") from None


def check_schema(schema: str) -> None:
    """Raises: UserError: `schema` is no JSON schema."""
    _validator(schema)


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
        if not isinstance(value, dict | bool):
            raise ValueError(f"it is {schema[:40]}; a schema is an object")
        found = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
        # What a schema says of a date or an address is meant, though the standard leaves it open.
        formats = jsonschema.FormatChecker(())
        formats.checkers = {**found.FORMAT_CHECKER.checkers}
        for name, function in _FORMATS.items():
            formats.checks(name, raises=ValueError)(function)
        found.check_schema(value, format_checker=formats)
    except (ValueError, RecursionError, jsonschema.SchemaError) as error:
        raise UserError(f"no JSON schema: {' '.join(str(error).split())[:200]}") from None
    _check_references(value)
    return jsonschema.validators.extend(found, {"pattern": _keeps_pattern})(value, format_checker=formats)


def _check_references(schema: Any) -> None:
    """Raises: UserError: a reference into the schema itself leads nowhere. With an `$id` they may be relative to it."""
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    found = list(_references(schema))
    if not found or '"$id"' in json.dumps(schema):
        return
    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = Registry().with_resource("", resource).resolver()
    for reference in found:
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            raise UserError(f"the JSON schema refers to what it does not hold: {error}") from None


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _keeps_pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    r"""As jsonschema's own, with classes such as `\p{L}`, and an end: `(a+)+b` may take forever."""
    import jsonschema
    import regex

    if not validator.is_type(instance, "string"):
        return
    try:
        kept = regex.search(pattern, instance, timeout=PATTERN_TIMEOUT_S) is not None
    except TimeoutError:
        kept = False
    if not kept:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _is_date_time(value: object) -> bool:
    match = _DATE_TIME.fullmatch(value) if isinstance(value, str) else None
    return not isinstance(value, str) or (match is not None and _clock(match["date"], match["time"]))


def _is_time(value: object) -> bool:
    return not isinstance(value, str) or _clock("2000-01-01", value)


def _clock(date: str, time: str) -> bool:
    """Raises: ValueError: there is no such day or hour."""
    match = _TIME.fullmatch(time)
    if not match:
        return False
    # A leap second is one.
    second = "59" if match["second"] == "60" else match["second"]
    datetime.fromisoformat(f"{date}T{match['clock']}{second}{match['rest'].upper()}")
    return True


def _is_uri(value: object) -> bool:
    return not isinstance(value, str) or _URI.fullmatch(value) is not None


def _is_regex(value: object) -> bool:
    import regex

    if isinstance(value, str):
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(str(error)) from None
    return True


_FORMATS: dict[str, Callable[[object], bool]] = {
    "date-time": _is_date_time,
    "time": _is_time,
    "uri": _is_uri,
    "regex": _is_regex,
}
