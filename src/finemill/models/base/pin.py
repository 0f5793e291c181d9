"""One commit of a base model for all steps of a pipeline run, though each resolves its inputs by itself."""

import hashlib

from finemill.artifacts.manifest import Producer, Reference, new_manifest
from finemill.models.base.resolve import HubModel, is_commit, locate, resolve_base_model
from finemill.storage.store import check_writable, fetch_artifact, publish_artifact, read_manifest, staging_folder

_REFERENCE_FILE = "base_model"


def pin_base_model(reference: str, store: str, run_id: str | None, made_by: Producer) -> str:
    """The reference with the commit that it stands for in the pipeline run `run_id`.

    A branch, or the newest commit, may be another one an hour later, when the next step of the run asks. So the first
    step to ask leaves the answer in the store, for all of them. Without a run it is what the hub says now. References
    of other forms come back unchanged.
    Raises: as `resolve_base_model`.
    """
    place = locate(reference)
    if not isinstance(place, HubModel) or is_commit(place.revision):
        return reference
    if run_id is None:
        return resolve_base_model(reference, "config").id
    call = hashlib.sha256(f"{run_id} {reference}".encode()).hexdigest()[:20]
    uri = f"{store}/runs/base-model-{call}"
    standing = _published(uri)
    if standing is None:
        check_writable(store)
        standing = _publish(uri, resolve_base_model(reference, "config").id, made_by)
    return standing


def _published(uri: str) -> str | None:
    manifest = read_manifest(uri)
    if manifest is None:
        return None
    return (fetch_artifact(Reference(uri, manifest.digest))[0] / _REFERENCE_FILE).read_text()


def _publish(uri: str, reference: str, made_by: Producer) -> str:
    """Leave the answer. Returns: the one that stands, which is another's if somebody else was faster."""
    folder = staging_folder(uri)
    (folder / _REFERENCE_FILE).write_text(reference)
    publish_artifact(folder, uri, new_manifest("base-model", folder, made_by))
    return _published(uri) or reference
