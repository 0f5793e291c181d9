"""The base of every step's configuration: frozen, typed, unknown keys refused."""

from reprlib import Repr
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from finemill.errors import UserError


class StepConfig(BaseModel):
    """A frozen model whose field docstrings are the help texts and the JSON schema."""

    not_in_key: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change what the step writes: with another value it still finds its output and checkpoints."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


_brief = Repr()
"""Shows a value in a few words, however large what a file's anchors expand to is."""
_brief.maxstring = _brief.maxother = 80
_brief.maxlevel = 2

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse_config(model: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Validate `values` as `model`.

    Raises: UserError: one line that names `where`, each bad key, what was found and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_validation_error(error, model)}") from None


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Every problem of a failed validation in one line, unknown keys with the keys that exist."""
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            allowed = ", ".join(sorted(_fields_at(model, item["loc"][:-1])))
            problems.append(f"unknown key '{key}' (allowed: {allowed})")
        elif item["type"] == "value_error":
            # A rule of our own: its message names fields and values.
            problems.append((f"'{key}': " if item["loc"] else "") + str(item["ctx"]["error"]))
        else:
            found = "" if item["type"] == "missing" else f" (found {_brief.repr(item['input']):.160})"
            problems.append(f"'{key}': {item['msg']}{found}")
    return "; ".join(problems)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)
