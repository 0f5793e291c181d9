"""A run's configuration as the parameters of its pipeline."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, create_model

from finemill.config import StepConfig
from finemill.errors import UserError


def run_parameters(config: StepConfig) -> dict[str, Any]:
    """What differs from the defaults: text for `base_model` and the like, a mapping per step.

    Raises: UserError: a value is null where the default is not; KFP's parameters know no null.
    """
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    for name in type(config).model_fields:
        if isinstance(getattr(config, name), str):
            values[name] = getattr(config, name)
    _refuse_nulls(values, "")
    return values


def _refuse_nulls(value: Any, path: str) -> None:
    if value is None:
        raise UserError(f"'{path}' is null, which a pipeline's parameters cannot carry: leave it out or give a value")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _refuse_nulls(entry, f"{path}.{key}".lstrip("."))
    if isinstance(value, list):
        for entry in value:
            _refuse_nulls(entry, path)


def with_optional_fields(model: type[StepConfig]) -> type[StepConfig]:
    """The same configuration with nothing required: for a pipeline whose runs bring what is missing."""
    optional: dict[str, Any] = {
        name: (field.annotation | None, Field(default=None, description=field.description))
        for name, field in model.model_fields.items()
        if field.is_required() and field.annotation is not None
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **optional)
