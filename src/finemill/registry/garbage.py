"""What may be deleted from a store: old artifacts that no registered version is or was made from."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from finemill.artifacts.manifest import MANIFEST_NAME, Reference
from finemill.errors import UserError
from finemill.runtime.catalog import STEPS
from finemill.storage.base import StoredFile
from finemill.storage.store import list_stored_files, read_manifest

# How many parts an artifact's place under the store has. Nothing else in a store is looked at.
_DEPTHS = {**dict.fromkeys(STEPS, 2), "failures": 2, "checkpoints": 3}
_STAGING = ".staging"


@dataclass(frozen=True)
class StoredArtifact:
    """An artifact in a store, complete or left over from an attempt that died; `modified` is its newest file's time."""

    uri: str
    size_bytes: int
    modified: datetime
    complete: bool


def find_garbage(store_uri: str, registered: Iterable[Reference], before: datetime) -> list[StoredArtifact]:
    """Artifacts last written before `before` that nothing needs, oldest first.

    Needed is what `registered` names, what is younger, and everything that these were made from. What a run in progress
    has found in the store and is about to use, nobody knows: `before` should lie further back than any run takes.
    """
    artifacts = {artifact.uri: artifact for artifact in _artifacts(store_uri)}
    reached = {reference.uri for reference in registered}
    reached |= {uri for uri, artifact in artifacts.items() if artifact.modified >= before}
    needed: set[str] = set()
    while reached:
        uri = reached.pop()
        if uri in artifacts and uri not in needed:
            needed.add(uri)
            reached |= _parents(artifacts[uri])
    garbage = [artifact for uri, artifact in artifacts.items() if uri not in needed]
    return sorted(garbage, key=lambda artifact: (artifact.modified, artifact.uri))


def _artifacts(store_uri: str) -> list[StoredArtifact]:
    groups: dict[str, list[StoredFile]] = defaultdict(list)
    for file in list_stored_files(store_uri):
        parts = file.name.split("/")
        depth = _DEPTHS.get(parts[0], 0) + (_STAGING in parts[:3])
        if depth and len(parts) > depth:
            groups["/".join(parts[:depth])].append(file)
    return [
        StoredArtifact(
            f"{store_uri}/{name}",
            sum(file.size for file in files),
            max(file.modified for file in files),
            f"{name}/{MANIFEST_NAME}" in {file.name for file in files},
        )
        for name, files in groups.items()
    ]


def _parents(artifact: StoredArtifact) -> set[str]:
    """Where the artifacts lie that this one was made from; none for one that is not whole."""
    if not artifact.complete:
        return set()
    try:
        manifest = read_manifest(artifact.uri)
    except UserError:
        return set()
    references = manifest.parents.values() if manifest else ()
    return {Reference.parse(value).uri for value in references if "@sha256:" in value}
