"""JSON schemas: read once, their references and patterns checked before the first answer."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from fractions import Fraction
from functools import lru_cache
from typing import Any

from finemill.errors import UserError

PATTERN_TIMEOUT_S = 1.0
_DATE_TIME = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})[Tt](?P<time>.+)", re.ASCII)
_TIME = re.compile(r"(?P<clock>\d{2}:\d{2}:)(?P<second>\d{2})(?P<rest>(?:\.\d+)?(?:[Zz]|[-+]\d{2}:\d{2}))", re.ASCII)
_DURATION = re.compile(
    r"P(?:\d+W|(?=\d|T\d)(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=\d)(?:\d+H)?(?:\d+M)?(?:\d+(?:\.\d+)?S)?)?)", re.ASCII
)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_EMAIL = re.compile(
    rf"(?:[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}|\"[^\"\n]{{1,62}}\")@(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])"
)
_POINTER = re.compile(r"(?:/(?:[^~/]|~[01])*)*")
_URI_REFERENCE = re.compile(r"(?:[A-Za-z0-9._~:/?#@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})*")
# What ECMA-262, whose patterns a schema has, reads otherwise than Python: the end is the end, digits are ASCII.
_PATTERN_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", re.DOTALL)
_ASCII_CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_"}
# Where a schema holds values and no schemas.
_VALUES = ("enum", "const", "default", "examples")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?:[A-Za-z0-9._~:/?#@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})*")


def keeps(value: Any, schema: str) -> bool:
    """Whether a JSON value keeps a schema. Raises: UserError: the schema is none, or refers to what is not in it."""
    from referencing.exceptions import Unresolvable

    try:
        return bool(_validator(schema).is_valid(value))
    except re.error as error:
        raise UserError(f"the JSON schema holds a pattern that is no regular expression: {error}") from None
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
        value = _unwrapped(json.loads(schema, parse_constant=_refuse_constant))
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
    return jsonschema.validators.extend(found, _KEYWORDS)(value, format_checker=formats)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unwrapped(value: Any) -> Any:
    """The schema within OpenAI's `response_format`, which has it beside a name; any other value as it is."""
    if (
        isinstance(value, Mapping)
        and value.get("type") == "json_schema"
        and isinstance(value.get("json_schema"), Mapping)
    ):
        value = value["json_schema"]
    named = isinstance(value, Mapping) and value.keys() <= {"name", "description", "strict", "schema"}
    return value["schema"] if named and isinstance(value.get("schema"), Mapping) else value


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
        for name, part in value.items():
            if name not in _VALUES:
                yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _matches(pattern: str, text: str) -> bool:
    r"""Whether `pattern` occurs in `text`, with classes such as `\p{L}`, and an end: `(a+)+b` may take forever."""
    import regex

    try:
        return regex.search(_as_ecma(pattern), text, timeout=PATTERN_TIMEOUT_S) is not None
    except TimeoutError:
        return False


@lru_cache(maxsize=256)
def _as_ecma(pattern: str) -> str:
    def spelled(token: re.Match[str]) -> str:
        if token[0] == "$":
            return r"\Z"
        if token[0].startswith("["):
            return re.sub(r"\\.", lambda one: _ASCII_CLASSES.get(one[0], one[0]), token[0], flags=re.DOTALL)
        return f"[{_ASCII_CLASSES[token[0]]}]" if token[0] in _ASCII_CLASSES else token[0]

    return _PATTERN_TOKEN.sub(spelled, pattern)


def _keeps_pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    import jsonschema

    if validator.is_type(instance, "string") and not _matches(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _keeps_pattern_properties(validator: Any, patterns: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "object"):
        for pattern, schema in patterns.items():
            for name, value in instance.items():
                if _matches(pattern, name):
                    yield from validator.descend(value, schema, path=name, schema_path=pattern)


def _keeps_additional_properties(validator: Any, additional: Any, instance: Any, schema: Any) -> Iterator[Any]:
    import jsonschema

    if not validator.is_type(instance, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, value in instance.items():
        if name in known or any(_matches(pattern, name) for pattern in patterns):
            continue
        if additional is False:
            yield jsonschema.ValidationError(f"{name!r} is not among the properties")
        else:
            yield from validator.descend(value, additional, path=name)


def _keeps_multiple_of(validator: Any, factor: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    """Of the decimals as written: in binary 0.3 is no multiple of 0.1."""
    import jsonschema

    if validator.is_type(instance, "number") and Fraction(str(instance)) % Fraction(str(factor)):
        yield jsonschema.ValidationError(f"{instance!r} is no multiple of {factor!r}")


_KEYWORDS = {
    "pattern": _keeps_pattern,
    "patternProperties": _keeps_pattern_properties,
    "additionalProperties": _keeps_additional_properties,
    "multipleOf": _keeps_multiple_of,
}


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


def _form(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or pattern.fullmatch(value) is not None


def _is_regex(value: object) -> bool:
    import regex

    if isinstance(value, str):
        try:
            regex.compile(_as_ecma(value))
        except regex.error as error:
            raise ValueError(str(error)) from None
    return True


_FORMATS: dict[str, Callable[[object], bool]] = {
    "date-time": _is_date_time,
    "time": _is_time,
    "uri": _form(_URI),
    "uri-reference": _form(_URI_REFERENCE),
    "duration": _form(_DURATION),
    "hostname": _form(_HOSTNAME),
    "email": _form(_EMAIL),
    "json-pointer": _form(_POINTER),
    "regex": _is_regex,
}
