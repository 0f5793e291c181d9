"""A run's configuration as the parameters of its pipeline."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, create_model

from finemill.config import StepConfig
from finemill.credentials import without_credentials
from finemill.errors import UserError
from finemill.transport import pack_for_kfp, pack_long

SUBMITTED_CHARACTERS = 10_000
"""Characters of JSON that KFP's server takes per parameter of a run."""
ARGUMENT_CHARACTERS = 90_000
"""Characters of JSON that fit into an argument, in base64 too: Linux takes 128 KiB."""
SHARED_STORE = r"^s3://[A-Za-z0-9][A-Za-z0-9.:_-]*(/[^{}$\x00-\x1f\x7f]*)?$"
"""Regular expression of a store that pods share, and that no engine evaluates."""


def run_parameters(config: StepConfig) -> dict[str, Any]:
    """What differs from the defaults: text for `base_model` and the like, a mapping per step."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    for name in type(config).model_fields:
        if isinstance(getattr(config, name), str):
            values[name] = getattr(config, name)
    return values


def for_kfp(values: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Parameters in the form that KFP hands on as it is, see `finemill.transport`.

    Raises: UserError: one has more than `longest` characters even so.
    """
    packed = {name: pack_for_kfp(value) for name, value in values.items()}
    for name, value in packed.items():
        _check_length(name, value, longest)
    return packed


def for_argo(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as texts, mappings as JSON. Raises: UserError: one is longer than an argument may be."""
    texts = {}
    for name, value in values.items():
        short = pack_long(value) if isinstance(value, Mapping) else value
        _check_length(name, short, ARGUMENT_CHARACTERS)
        texts[name] = short if isinstance(short, str) else to_json(short)
    return texts


def check_shared_store(uri: str) -> None:
    """Raises: UserError: pods of a cluster cannot share this store."""
    if not re.fullmatch(SHARED_STORE, uri):
        raise UserError(f"store '{without_credentials(uri)}': pods share nothing but S3, write s3://bucket/prefix")


def to_json(value: Mapping[str, Any]) -> str:
    """JSON in which Argo finds nothing to evaluate: two braces at once are part of a text."""
    return json.dumps(value, sort_keys=True).replace("{{", r"\u007b\u007b")


def _check_length(name: str, value: Any, limit: int) -> None:
    length = len(value if isinstance(value, str) else json.dumps(value))
    if length > limit:
        raise UserError(
            f"'{name}' has {length} characters, compressed, and a pipeline's parameter may have {limit}: name folders "
            "or patterns instead of single files, or move texts into files that the steps read"
        )


def with_optional_fields(model: type[StepConfig]) -> type[StepConfig]:
    """The same configuration with nothing required: for a pipeline whose runs bring what is missing."""
    optional: dict[str, Any] = {
        name: (field.annotation | None, Field(default=None, description=field.description))
        for name, field in model.model_fields.items()
        if field.is_required() and field.annotation is not None
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **optional)
