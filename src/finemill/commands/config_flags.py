"""A command line flag for every field of a config model, and the order of precedence: defaults < file < flags."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finemill.config import ConfigT, parse_config
from finemill.config_file import parse_yaml, read_mapping
from finemill.errors import UserError
from finemill.transport import decode_text, unpack


def add_config_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """Add `--config`, `--config-json` and one flag per field; sections nest with a dot, `--merge.dtype float16`."""
    group = parser.add_argument_group("configuration (later wins: defaults, --config, --config-json, flags)")
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the fields below")
    group.add_argument(
        "--config-json",
        action="append",
        default=[],
        metavar="JSON",
        help="the same as JSON text, also as base64:TEXT; may be repeated",
    )
    _add_fields(group, model, "")


def _add_fields(group: Any, model: type[BaseModel], prefix: str) -> None:
    for name, field in model.model_fields.items():
        section = _section(field)
        path = f"{prefix}{field.alias or name}"
        if section is not None:
            _add_fields(group, section, f"{path}.")
            continue
        flag = "--" + path.replace("_", "-")
        group.add_argument(
            flag, dest=f"config:{path}", default=argparse.SUPPRESS, metavar="VALUE", help=_help_text(field)
        )


def _section(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _help_text(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    default = "" if field.is_required() else f" (default: {field.get_default(call_default_factory=True)!r})"
    return (text + default).replace("%", "%%")


def read_config(parsed: argparse.Namespace, model: type[ConfigT], where: str, default: Path | None = None) -> ConfigT:
    """The validated configuration of a parsed command line.

    Args:
        where: the command, for what is wrong with no file.
        default: a file that comes with finemill, read where the user names none.
    Raises: UserError: a file or a value is wrong; the line says whether it is the file's or a flag's.
    """
    file = parsed.config or default
    values = read_mapping(file, "config file") if file else {}
    origins: dict[str, str] = {}
    for text in parsed.config_json:
        given = _read_json(text)
        values = merge_values(values, given)
        origins |= dict.fromkeys(_keys(given), "--config-json")
    for name, text in vars(parsed).items():
        if name.startswith("config:"):
            key = name.removeprefix("config:")
            values = merge_values(values, _nest(key, _read_value(text, model, key)))
            origins[key] = f"--{key.replace('_', '-')}"
    return parse_config(model, values, str(parsed.config or where), origins)


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all that is no mapping."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def merge_values(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, mapping by mapping; lists and scalars are replaced whole."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_values(merged[key], value) if both else value
    return merged


def _read_json(text: str) -> dict[str, Any]:
    try:
        loaded = unpack(json.loads(decode_text(text), object_pairs_hook=_each_key_once))
    except RecursionError:
        raise UserError("--config-json is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"--config-json is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"--config-json holds a {type(loaded).__name__}; an object of fields to values is needed")
    return loaded


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"--config-json: '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return values


def _read_value(text: str, model: type[BaseModel], key: str) -> Any:
    """Text stays text for a string field; otherwise it is read as YAML (`32`, `true`, `null`, `[a, b]`)."""
    annotation = _annotation(model, key.split("."))
    kinds = {annotation, *(get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ())}
    if str in kinds and not kinds & {int, float, bool} and not (text == "null" and type(None) in kinds):
        return text
    try:
        return parse_yaml(text, key)
    except UserError:
        return text


def _annotation(model: type[BaseModel], path: list[str]) -> Any:
    field = next(field for name, field in model.model_fields.items() if (field.alias or name) == path[0])
    section = _section(field)
    return _annotation(section, path[1:]) if section else field.annotation


def _nest(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {first: _nest(rest, value) if rest else value}
