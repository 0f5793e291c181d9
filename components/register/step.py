"""Register the results as a version of a model, by reference: MLflow records where they are, and gets no copy."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finemill.artifacts.manifest import Manifest, Reference
from finemill.artifacts.version import VersionRecord, write_version
from finemill.components.register.config import RegisterConfig
from finemill.components.register.describe import describe_version, score_tags
from finemill.credentials import without_credentials
from finemill.errors import UserError
from finemill.registry.snapshot import (
    ARTIFACT_TAG,
    CHALLENGER,
    CHAMPION,
    DIGEST_TAG,
    check_registry_reads,
    ensure_registered_model,
    locked,
    registry_state_of,
)
from finemill.runtime.context import StepContext
from finemill.tracking.describe import RUN_ID_TAG, lineage_tags, origin_tags
from finemill.tracking.server import find_experiment, open_client, readable_errors
from finemill.tracking.settings import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient


def registry_state(inputs: Mapping[str, str], config: RegisterConfig, tracking: Tracking) -> dict[str, str]:
    """Which registered model, and the number that these artifacts have or will get in it.

    The same before and after registering, and another one when the registry or the version was deleted since.
    """
    model = ensure_registered_model(tracking.registry, config.registered_model_name)
    standing = model.by_tag(DIGEST_TAG, registration_digest(inputs))
    number = standing.number if standing else model.next_number
    return {"registered_model": registry_state_of(model), "version": str(number)}


def registration_digest(inputs: Mapping[str, str]) -> str:
    """The sha256 over ports and artifact digests."""
    lines = (f"{port} {Reference.parse(value).digest}\n" for port, value in sorted(inputs.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def run(*, output_dir: Path, config: RegisterConfig, context: StepContext) -> dict[str, float]:
    """Register the artifacts as one version, tagged with their digests and scores, and give it the alias.

    The same artifacts again are the same version: a retry after an interruption creates no second one.
    Raises: UserError: the artifacts do not belong together, or MLflow refuses the version.
    """
    _check_same_adapter(context)
    tracking = context.tracking
    check_registry_reads(tracking.registry, context.references[config.source])
    client = open_client(tracking.uri or tracking.registry, tracking.registry)
    with readable_errors(tracking.registry):
        record = _register(client, tracking.registry, config, context)
    write_version(output_dir, record)
    return {"register/version": float(record.version)}


def _register(client: "MlflowClient", uri: str, config: RegisterConfig, context: StepContext) -> VersionRecord:
    name = config.registered_model_name
    tags = version_tags(config, context)
    with locked(client, ensure_registered_model(uri, name), context.store):
        model = ensure_registered_model(uri, name)
        standing = model.by_tag(DIGEST_TAG, tags[DIGEST_TAG])
        number = standing.number if standing else _create(client, config, context, tags)
        if model.aliases.get(CHAMPION) != number:
            context.recorder.log_progress(f"version {number} of {name} gets the alias {CHALLENGER}")
            client.set_registered_model_alias(name, CHALLENGER, str(number))
    created = client.get_model_version(name, str(number))
    return VersionRecord(
        registered_model_name=name,
        version=number,
        alias=CHALLENGER,
        registry=without_credentials(uri),
        run_id=created.run_id or None,
        source=created.source,
        digest=tags[DIGEST_TAG],
        artifacts=dict(context.references),
    )


def _create(client: "MlflowClient", config: RegisterConfig, context: StepContext, tags: dict[str, str]) -> int:
    reference = Reference.parse(context.references[config.source])
    source = context.manifests[config.source].files_uri(reference.uri)
    version = client.create_model_version(
        config.registered_model_name,
        source,
        run_id=_run_id(client, context),
        tags=tags,
        description=describe_version(context.manifests["evaluation"].metrics, tags, context.references),
    )
    return int(version.version)


def version_tags(config: RegisterConfig, context: StepContext) -> dict[str, str]:
    """Artifacts, data set, base model, code and scores; a user's own tags first, so that they hide none of these."""
    parents = context.manifests["evaluation"].parents
    return {
        **config.tags,
        **origin_tags(context.manifests["adapter"].producer),
        **lineage_tags(parents),
        **score_tags(context.manifests["evaluation"].metrics),
        **{f"{ARTIFACT_TAG}{port}": value for port, value in context.references.items()},
        DIGEST_TAG: registration_digest(context.references),
    }


def _check_same_adapter(context: StepContext) -> None:
    """The evaluation, the merged model and the GGUF files must be this adapter's."""
    adapter = Reference.parse(context.references["adapter"]).digest
    model = Reference.parse(context.references["model"]).digest
    for port, parent, expected in (
        ("evaluation", "adapter", adapter),
        ("model", "adapter", adapter),
        ("gguf", "model", model),
    ):
        found = _parent_digest(context.manifests[port], parent)
        if found != expected:
            raise UserError(
                f"register: the {port} was made from the {parent} {found}, not from the given one, {expected}: "
                "pass artifacts of one line"
            )


def _parent_digest(manifest: Manifest, parent: str) -> str:
    text = manifest.parents.get(parent)
    return Reference.parse(text).digest if text else "(none)"


def _run_id(client: "MlflowClient", context: StepContext) -> str | None:
    """The MLflow run of the pipeline that this registration belongs to, where there is one."""
    tracking = context.tracking
    if tracking.adopted_run or not context.run_id or tracking.uri is None:
        return tracking.adopted_run
    found = client.search_runs(
        [find_experiment(client, tracking)], f"tags.`{RUN_ID_TAG}` = '{context.run_id}'", max_results=1
    )
    return str(found[0].info.run_id) if found else None
