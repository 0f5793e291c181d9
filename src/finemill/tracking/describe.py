"""A step run in the words of MLflow: flat parameters, tags, and nothing secret. Imports no MLflow."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from finemill.artifacts.manifest import Producer, Reference
from finemill.artifacts.ports import BASE_MODEL
from finemill.credentials import without_credentials

RUN_ID_TAG = "finemill.run_id"
STEP_TAG = "finemill.step"
OUTPUT_TAG = "finemill.output"
INPUT_TAG = "finemill.input."
"""Begins the tag with an input's reference; its port follows."""
REUSED_TAG = "finemill.reused"
WARNINGS_TAG = "finemill.warnings"


@dataclass(frozen=True)
class StepDescription:
    """What is known of a step before it computes; travels as JSON from a step to whoever records it."""

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    run_id: str | None = None

    @classmethod
    def of_call(
        cls, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], made_by: Producer, run_id: str | None
    ) -> "StepDescription":
        """Describe a call of the step `name`; `inputs` are references by port."""
        tags = {
            STEP_TAG: name,
            "mlflow.source.name": f"finemill {name}",
            **origin_tags(made_by),
            **({"mlflow.source.git.commit": made_by.git_sha} if made_by.git_sha else {}),
            **lineage_tags(inputs),
        }
        tags |= {f"{INPUT_TAG}{port}": without_credentials(value) for port, value in inputs.items()}
        return cls(name, flatten(config), tags, run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Parameters by dotted name; lists as JSON text, everything else as Python prints it, like transformers does."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value) if isinstance(value, list | tuple) else str(value)
            flat[f"{prefix}{key}"] = without_credentials(text)
    return flat


def lineage_tags(inputs: Mapping[str, str]) -> dict[str, str]:
    """`dataset.digest`, `base_model.id` and `base_model.revision`, as far as the inputs by port tell them."""
    tags = base_model_tags(inputs[BASE_MODEL]) if inputs.get(BASE_MODEL) else {}
    if inputs.get("dataset"):
        tags["dataset.digest"] = Reference.parse(inputs["dataset"]).digest
    return tags


def base_model_tags(reference: str) -> dict[str, str]:
    """Id and revision of a base model. A local folder is named without the folders around it."""
    if "@sha256:" in reference:
        parsed = Reference.parse(reference)
        return {"base_model.id": parsed.uri.rsplit("/", 1)[-1], "base_model.revision": f"sha256:{parsed.digest}"}
    if reference.startswith(("file:", "/", ".", "~")):
        return {"base_model.id": unquote(urlsplit(reference).path).rstrip("/").rsplit("/", 1)[-1]}
    name, _, revision = reference.removeprefix("hf://").partition("@")
    return {"base_model.id": name} | ({"base_model.revision": revision} if revision else {})


def origin_tags(made_by: Producer) -> dict[str, str]:
    """`git.sha`, `image`, `image.digest` and `finemill.version` of the code, as far as they are known.

    An image is named as its pod or its build names it, often by a tag, which may be another image tomorrow; the digest
    is told where that name has one.
    """
    found = {
        "git.sha": made_by.git_sha,
        "image": made_by.image,
        "image.digest": (made_by.image or "").partition("@")[2],
        "finemill.version": made_by.version,
    }
    return {key: value for key, value in found.items() if value}
