"""What can be said of a base model without fetching its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemill.errors import TemporaryError
from finemill.models.base.resolve import HubModel, check_model_files, locate, resolve_base_model

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class BaseFacts:
    """The exact model a reference stands for, and its config.json."""

    id: str
    config: dict[str, Any]


def inspect_base_model(reference: str) -> BaseFacts:
    """Resolve a base model reference, look at its files' names, and read its configuration.

    Raises: as `resolve_base_model`.
    """
    base = resolve_base_model(reference, "config")
    place = locate(reference)
    if isinstance(place, HubModel):
        check_model_files(_hub_files(HubModel(place.name, base.revision), base.path), base.id)
    return BaseFacts(base.id, json.loads((base.path / "config.json").read_text(encoding="utf-8")))


def _hub_files(model: HubModel, cached: Path) -> list[str]:
    """The names in the model's folder on the hub; offline those in its cache, where the steps will look, too."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        siblings = HfApi().model_info(model.name, revision=model.revision, timeout=TIMEOUT_S).siblings
    except OfflineModeIsEnabled:
        return [path.name for path in cached.iterdir()]
    except Exception as error:
        # The bases are OSError and what the hub's HTTP library raises where no answer came.
        if not isinstance(error, HfHubHTTPError.__bases__):
            raise
        line = " ".join(str(error).split())[:200]
        raise TemporaryError(f"base model '{model}': the hub is out of reach ({line})") from None
    names = [item.rfilename for item in siblings or []]
    return [name for name in names if "/" not in name]
