"""The base of every step's configuration: frozen, typed, unknown keys refused."""

from collections.abc import Iterator, Mapping
from reprlib import Repr
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

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

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic, as Python, takes true for 1, and YAML reads true where somebody wrote yes or on."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if kinds & {int, float} and not kinds & {bool, Any, object} and _holds_boolean(value):
            raise ValueError("true, false, yes, no, on and off are no number: give a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_beyond_64_bits(cls, value: Any) -> Any:
        """Python counts on where files, tensors and other languages end."""
        numbers = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > _LARGEST for number in numbers):
            raise ValueError(f"a whole number beyond {_LARGEST}: give a smaller one")
        return value


def _named(text: str) -> str:
    if not text.strip():
        raise ValueError("it names nothing: give a name, or leave it out")
    if text != text.strip() or not text.isprintable():
        raise ValueError("it has a line break, a tab or blanks around it: leave them out")
    return text


Input = Annotated[str, AfterValidator(_named)]
"""Type of what a run is given by name: a model, a folder, a reference."""
_LARGEST = 2**63 - 1
_brief = Repr()
"""Shows a value in a few words, however large what a file's anchors expand to is."""
_brief.maxstring = _brief.maxother = 80
_brief.maxlevel = 2

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse_config(
    model: type[ConfigT], values: Any, where: str, origins: Mapping[str, str] = MappingProxyType({})
) -> ConfigT:
    """Validate `values` as `model`.

    Args:
        where: the values come from.
        origins: of those that come from elsewhere, by dotted key.
    Raises: UserError: one line that names `where`, each bad key, what was found and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for key, text in _problems(error, model):
            origin = next((origins[part] for part in _above(key) if part in origins), where)
            problems.setdefault(origin, []).append(text)
        raise UserError("; ".join(f"{origin}: {'; '.join(texts)}" for origin, texts in problems.items())) from None


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Every problem of a failed validation in one line, unknown keys with the keys that exist."""
    return "; ".join(text for _, text in _problems(error, model))


def _above(key: str) -> Iterator[str]:
    """A dotted key, and those of the sections that it is in, from the innermost on."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _problems(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each problem of a failed validation, with the dotted key that it is about."""
    sections_said = set()
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            section = item["loc"][:-1]
            allowed = "" if section in sections_said else f" (allowed: {', '.join(sorted(_fields_at(model, section)))})"
            sections_said.add(section)
            yield key, f"unknown key '{key}'{allowed}"
        elif item["type"] == "value_error":
            # A rule of our own: its message names fields and values.
            yield key, (f"'{key}': " if item["loc"] else "") + f"{item['ctx']['error']!s:.1000}"
        else:
            found = "" if item["type"] == "missing" else f" (found {_brief.repr(item['input']):.160})"
            # YAML and flags know lists.
            yield key, f"'{key}': {item['msg'].replace('a valid tuple', 'a list')}{found}"


def _kinds(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of; nested models count as anything, since they look at their own fields."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield Any
    elif arguments := get_args(annotation):
        for argument in arguments:
            yield from _kinds(argument)
    else:
        yield annotation


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_boolean, value)))


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The names that a file may use where `location` leads, through lists and mappings of models, too."""
    for part in location:
        found = next((field for name, field in model.model_fields.items() if part in (field.alias, name)), None)
        # What is no field is a position in a list, or a key of a mapping.
        if found is not None:
            inner = _model_in(found.annotation)
            if inner is None:
                return []
            model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
