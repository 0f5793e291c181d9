"""What can be said of a base model without fetching its weights."""

import json
from dataclasses import dataclass
from typing import Any

from finemill.models.base.resolve import resolve_base_model


@dataclass(frozen=True)
class BaseFacts:
    """The exact model a reference stands for, and its config.json."""

    id: str
    config: dict[str, Any]


def inspect_base_model(reference: str) -> BaseFacts:
    """Resolve a base model reference and read its configuration. Raises: as `resolve_base_model`."""
    base = resolve_base_model(reference, "config")
    return BaseFacts(base.id, json.loads((base.path / "config.json").read_text(encoding="utf-8")))
