"""What may be deleted from a store: old artifacts that no registered version is or was made from.

An artifact is known by its digest and by its place in the store, never by its address: a store can be copied, mounted
elsewhere or renamed, and its registry keeps the addresses of then.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

from finemill.artifacts.decision import read_decision
from finemill.artifacts.manifest import DIGEST_MARK, MANIFEST_NAME, Reference
from finemill.errors import UserError
from finemill.runtime.catalog import STEPS
from finemill.storage.base import StoredFile, local_path
from finemill.storage.folder import abandoned_folders
from finemill.storage.store import fetch_artifact, list_stored_files, read_manifest

# How many parts an artifact's place under the store has. Nothing else in a store is looked at.
_DEPTHS = {**dict.fromkeys(STEPS, 2), "failures": 2, "checkpoints": 3}
_STAGING = ".staging"
_VERSIONS = "register/"
"""Where the artifacts of registered versions lie."""
_DECISIONS = "promote/"


@dataclass(frozen=True)
class StoredArtifact:
    """An artifact in a store, complete or left over from an attempt that died; `modified` is its newest file's time."""

    place: str
    uri: str
    size_bytes: int
    modified: datetime
    complete: bool


@dataclass(frozen=True)
class _Contents:
    """What a manifest says: the artifact's digest, and what it was made from. Nothing, if it cannot be read."""

    digest: str | None = None
    parents: tuple[Reference, ...] = ()
    problem: str | None = None


def find_garbage(
    store_uri: str, registered: Collection[Reference], older_than: timedelta, in_use: Collection[Reference] = ()
) -> list[StoredArtifact]:
    """Artifacts that nothing needs and that were last written `older_than` before the store's newest, oldest first.

    Needed is what `registered` names, what running steps have `in_use`, what is younger, everything that these were
    made from, and the decisions about registered versions with the scores that they were made by. Ages count from the
    newest artifact, as a clock that is ahead makes all of them old. What a run in progress has found in the store and
    is about to use, nobody knows: `older_than` should be more than any run takes.
    Raises: UserError: it is not certain what is registered.
    """
    artifacts = {artifact.place: artifact for artifact in _artifacts(store_uri)}
    if not artifacts:
        return []
    contents = {place: _read(artifact) for place, artifact in artifacts.items()}
    index = _index(contents)
    named = {place for reference in registered for place in _places(reference, index)}
    if not named and any(place.startswith(_VERSIONS) for place in artifacts):
        raise UserError(
            f"{store_uri} holds versions that were registered, and the registry names nothing in this store: set "
            f"MLFLOW_TRACKING_URI to the one they are in; if they were deleted there, delete {store_uri}/register too"
        )
    newest = min(max(artifact.modified for artifact in artifacts.values()), datetime.now(UTC))
    young = {place for place, artifact in artifacts.items() if artifact.modified >= newest - older_than}
    used = {place for reference in in_use for place in _places(reference, index)}
    needed = _with_parents(named | young | used, contents, index)
    needed |= _decided_by(needed, artifacts, contents, index)
    for place in sorted(needed):
        if contents[place].problem:
            raise UserError(
                f"what {artifacts[place].uri} was made from is not known, and nothing is deleted "
                f"({contents[place].problem})"
            )
    garbage = [artifact for place, artifact in artifacts.items() if place not in needed]
    return sorted(garbage, key=lambda artifact: (artifact.modified, artifact.place))


def find_leftovers(store_uri: str, older_than: timedelta) -> list[StoredArtifact]:
    """What steps that were killed had begun to write in a folder store, unchanged for `older_than`, oldest first.

    No registry names any of it, and no process of this machine holds it. In front of a bucket, outputs are prepared in
    the cache.
    """
    if not store_uri.startswith("file:"):
        return []
    root = local_path(store_uri)
    limit = _now(root) - older_than
    found = [_leftover(path, path.relative_to(root).as_posix(), store_uri) for path in abandoned_folders(store_uri)]
    return sorted((item for item in found if item.modified <= limit), key=lambda item: (item.modified, item.place))


def _now(root: Path) -> datetime:
    """The time by the clock of the file system that the store is in, which a share's other machines write by, too."""
    now = datetime.now(UTC)
    with suppress(OSError), NamedTemporaryFile(dir=root, prefix=".clock-") as probe:
        now = min(now, datetime.fromtimestamp(os.fstat(probe.fileno()).st_mtime, UTC))
    return now


def _leftover(folder: Path, place: str, store_uri: str) -> StoredArtifact:
    files = list_stored_files(folder.as_uri())
    with suppress(FileNotFoundError):
        files = (*files, StoredFile("", 0, datetime.fromtimestamp(folder.stat().st_mtime, UTC)))
    return StoredArtifact(
        place,
        f"{store_uri}/{place}",
        sum(file.size for file in files),
        max((file.modified for file in files), default=datetime.now(UTC)),
        complete=False,
    )


def _artifacts(store_uri: str) -> list[StoredArtifact]:
    groups: dict[str, list[StoredFile]] = defaultdict(list)
    for file in list_stored_files(store_uri):
        parts = file.name.split("/")
        depth = _DEPTHS.get(parts[0], 0)
        if depth and len(parts) > depth and _STAGING not in parts[:depth]:
            groups["/".join(parts[:depth])].append(file)
    return [
        StoredArtifact(
            name,
            f"{store_uri}/{name}",
            sum(file.size for file in files),
            max(file.modified for file in files),
            f"{name}/{MANIFEST_NAME}" in {file.name for file in files},
        )
        for name, files in groups.items()
    ]


def _read(artifact: StoredArtifact) -> _Contents:
    if not artifact.complete:
        return _Contents()
    try:
        manifest = read_manifest(artifact.uri)
    except UserError as error:
        return _Contents(problem=str(error))
    if manifest is None:
        return _Contents()
    parents = [Reference.parse(value) for value in manifest.parents.values() if DIGEST_MARK in value]
    parents += filter(None, map(_reference, _texts(manifest.config)))
    return _Contents(manifest.digest, tuple(parents))


def _reference(text: str) -> Reference | None:
    try:
        return Reference.parse(text)
    except UserError:
        return None


def _texts(value: object) -> Iterator[str]:
    """The texts in a configuration: a list in it may name artifacts, as further adapters of a merge."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


def _index(contents: dict[str, _Contents]) -> dict[str, set[str]]:
    """The places of artifacts by digest, and by the last two parts of their place."""
    index: dict[str, set[str]] = defaultdict(set)
    for place, content in contents.items():
        index[_tail(place)].add(place)
        if content.digest:
            index[content.digest].add(place)
    return index


def _places(reference: Reference, index: dict[str, set[str]]) -> set[str]:
    """Where in the store the artifact of a reference lies, or may lie."""
    return index.get(reference.digest, set()) | index.get(_tail(reference.uri), set())


def _tail(address: str) -> str:
    return "/".join(address.split("/")[-2:])


def _decided_by(
    needed: set[str],
    artifacts: Mapping[str, StoredArtifact],
    contents: dict[str, _Contents],
    index: dict[str, set[str]],
) -> set[str]:
    """Decisions about what is needed, and the evaluation of the champion of then, so that each can be replayed."""
    found = set[str]()
    for place, content in contents.items():
        about = {made_from for parent in content.parents for made_from in _places(parent, index)}
        if place.startswith(_DECISIONS) and content.digest and about & needed:
            folder, _ = fetch_artifact(Reference(artifacts[place].uri, content.digest))
            champion = read_decision(folder).champion_evaluation
            found |= {place} | about | (_places(Reference.parse(champion), index) if champion else set())
    return found - needed


def _with_parents(places: Iterable[str], contents: dict[str, _Contents], index: dict[str, set[str]]) -> set[str]:
    """These artifacts and all that they were made from."""
    reached, needed = set(places), set[str]()
    while reached:
        place = reached.pop()
        if place not in needed:
            needed.add(place)
            reached |= {found for parent in contents[place].parents for found in _places(parent, index)}
    return needed
