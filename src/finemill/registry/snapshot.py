"""MLflow's model registry: what is known of a registered model, read in one go.

What register, promote, rollback and detect-change decide, they decide on this snapshot. Names of tags and aliases are
here, and nowhere else.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finemill.artifacts.manifest import Reference
from finemill.credentials import without_credentials
from finemill.errors import UserError
from finemill.storage.store import hold_lock
from finemill.tracking.server import open_client, readable_errors, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

CHALLENGER = "challenger"
CHAMPION = "champion"
PREVIOUS_CHAMPION = "previous_champion"

DIGEST_TAG = "finemill.digest"
"""The sha256 over the digests of all artifacts of a version: the same artifacts are the same version."""
ARTIFACT_TAG = "finemill.artifact."
"""Followed by a port, `adapter`, `evaluation`, ...: the artifact's reference."""
EVALUATION_TAG = "finemill.evaluation."
"""Followed by the digest of a test: on a champion, the evaluation made for a comparison with a version that was scored
on other rows."""
COMPARED_TAG = "finemill.compared_with"
"""On a version that was made champion: the version that was champion before, or `none`."""
ROLLED_BACK_TAG = "finemill.rolled_back"
"""On a version that was champion and was rolled back: when. `_by` and `_why` follow as tags of their own."""
APPROVED_TAG = "finemill.approved"
"""On a version that a person approved: when. `_by` and `_why` follow as tags of their own."""
BY, WHY = "_by", "_why"
DECISION_TAG = "finemill.decision"
"""On a version: what `promote` decided last, in one line."""
LOCK_TAG = "finemill.lock"
"""On a registered model: the URI of the lock that whoever moves its aliases holds."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The same for everyone, wherever they work: no folder that a program happens to stand in.
_LOCK = re.compile(r"(?:(?:file://)?/|s3://[^/\s]+/)[^\0\n]+\.lock")


def check_registered_model_name(name: str) -> str:
    """A name that MLflow takes, and that its searches and URIs need not quote.

    Raises: ValueError: the name has other characters.
    """
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "finemill"
        raise ValueError(f"a registered model's name has letters, digits, . _ - only; write {better}")
    return name


@dataclass(frozen=True)
class Version:
    """One version of a registered model; `created` in milliseconds."""

    number: int
    created: int
    tags: Mapping[str, str]

    def artifact(self, port: str) -> Reference | None:
        """The reference of one of the version's artifacts. Raises: UserError: its tag holds none."""
        text = self.tags.get(f"{ARTIFACT_TAG}{port}")
        try:
            return Reference.parse(text) if text else None
        except UserError as error:
            raise UserError(f"version {self.number} in the registry, tag {ARTIFACT_TAG}{port}: {error}") from None

    @property
    def artifacts(self) -> dict[str, str]:
        """The references of all of them by port, without credentials."""
        return {
            key.removeprefix(ARTIFACT_TAG): without_credentials(value)
            for key, value in self.tags.items()
            if key.startswith(ARTIFACT_TAG)
        }


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model in the registry at `registry_uri`: its versions by number, and its aliases but those of
    versions that were deleted.
    """

    name: str
    created: int
    next_number: int
    registry_uri: str
    versions: Mapping[int, Version] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    lock_uri: str | None = None

    def by_alias(self, alias: str) -> Version | None:
        """The version that carries `alias`."""
        number = self.aliases.get(alias)
        return self.versions.get(number) if number is not None else None

    def by_tag(self, key: str, value: str) -> Version | None:
        """The newest version with this tag."""
        found = [version for version in self.versions.values() if version.tags.get(key) == value]
        return max(found, key=lambda version: version.number, default=None)

    @property
    def newest(self) -> Version | None:
        """The version with the highest number."""
        return max(self.versions.values(), key=lambda version: version.number, default=None)


def check_registry_reads(uri: str, place: str) -> None:
    """Raises: UserError: `uri` is a server, and `place`, a store or artifact, is in a folder that only we can read."""
    if uri.startswith("http") and place.startswith("file:"):
        raise UserError(
            f"register: the MLflow server at {without_credentials(uri)} refuses models in {place.partition('@')[0]}: "
            "use an s3:// store, or with a folder an SQLite registry, MLFLOW_TRACKING_URI=sqlite:///folder/mlflow.db"
        )


def read_registered_model(uri: str, name: str) -> RegisteredModel | None:
    """The registered model `name` of the registry at `uri`, None if there is none.

    An SQLite registry is read directly: importing MLflow takes seconds, and a step that is only to find out that
    nothing has changed should take none. If MLflow has changed its tables, it is asked itself, with a warning.
    """
    path = sqlite_path(uri)
    if path is not None and not os.environ.get("MLFLOW_WORKSPACE"):
        try:
            return _read_sqlite(path, uri, name)
        except sqlite3.Error as error:
            logger.warning("the registry in %s cannot be read directly (%s): MLflow is asked, in seconds", path, error)
    client = open_client(uri)
    with readable_errors(uri):
        return _read_client(client, uri, name)


def _read_sqlite(path: Path, uri: str, name: str) -> RegisteredModel | None:
    if not path.exists():
        return None
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as database:

        def rows(columns: str, table: str) -> list[Any]:
            return database.execute(f"SELECT {columns} FROM {table} WHERE name = ?", (name,)).fetchall()

        if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall():
            return None
        models = rows("creation_time", "registered_models")
        if not models:
            return None
        tags: dict[int, dict[str, str]] = {}
        for number, key, value in rows("version, key, value", "model_version_tags"):
            tags.setdefault(int(number), {})[key] = value
        found = rows("version, creation_time, current_stage", "model_versions")
        versions = {
            int(number): Version(int(number), int(created), tags.get(int(number), {}))
            for number, created, stage in found
            if stage != "Deleted_Internal"
        }
        return RegisteredModel(
            name,
            int(models[0][0]),
            next_number=max((int(number) for number, _, _ in found), default=0) + 1,
            registry_uri=uri,
            versions=versions,
            aliases=_living(dict(rows("alias, version", "registered_model_aliases")), versions),
            lock_uri=dict(rows("key, value", "registered_model_tags")).get(LOCK_TAG),
        )


def _read_client(client: "MlflowClient", uri: str, name: str) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    versions = {
        int(item.version): Version(int(item.version), int(item.creation_timestamp), dict(item.tags))
        for item in _all_versions(client, name)
    }
    return RegisteredModel(
        name,
        int(model.creation_timestamp),
        next_number=max(versions, default=0) + 1,
        registry_uri=uri,
        versions=versions,
        aliases=_living(model.aliases, versions),
        lock_uri=model.tags.get(LOCK_TAG),
    )


def _living(aliases: Mapping[str, Any], versions: Mapping[int, Version]) -> dict[str, int]:
    """The aliases of versions that exist: some of MLflow's stores keep those of deleted ones."""
    return {alias: int(number) for alias, number in aliases.items() if int(number) in versions}


def _all_versions(client: "MlflowClient", name: str | None = None) -> "list[ModelVersion]":
    """Every version of one registered model, or of all."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'" if name else "", page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def registered_artifacts(uri: str) -> list[Reference]:
    """The artifacts that any version of any registered model of the registry at `uri` refers to."""
    client = open_client(uri)
    with readable_errors(uri):
        versions = _all_versions(client)
    return [
        Reference.parse(value)
        for version in versions
        for key, value in version.tags.items()
        if key.startswith((ARTIFACT_TAG, EVALUATION_TAG))
    ]


def ensure_registered_model(uri: str, name: str) -> RegisteredModel:
    """The registered model `name` of the registry at `uri`, created if there is none."""
    model = read_registered_model(uri, name)
    if model is not None:
        return model
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    with readable_errors(uri):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        created = _read_client(client, uri, name)
    if created is None:
        raise UserError(f"registered model '{name}' was deleted while it was being created: run the step again")
    return created


def registry_state_of(model: RegisteredModel) -> str:
    """Tells this registered model from one of the same name in another registry, or made anew."""
    return f"{without_credentials(model.registry_uri)} {model.name} {model.created}"


@contextmanager
def locked(client: "MlflowClient", model: RegisteredModel, store: str | None) -> Iterator[None]:
    """Hold the lock of a registered model, which lies in the store of its first version.

    MLflow moves an alias without looking at where it points, so whoever decides from where it points holds this.
    Raises: UserError: the registered model names none.
    """
    lock_uri = model.lock_uri
    if lock_uri is None:
        if store is None:
            raise UserError(f"registered model '{model.name}' has no {LOCK_TAG} tag: it was not made by `register`")
        lock_uri = f"{store}/locks/registered-model-{model.name}.lock"
        lock_uri = _agree_on_lock(client, model.name, lock_uri)
    if not _LOCK.fullmatch(lock_uri):
        raise UserError(
            f"registered model '{model.name}': its tag {LOCK_TAG}, '{lock_uri:.200}', names no lock, without which two "
            f"promotions may pass each other: set it to STORE/locks/registered-model-{model.name}.lock, where STORE is "
            "the file:///folder or s3://bucket/prefix of its first version"
        )
    with hold_lock(lock_uri):
        yield


def _agree_on_lock(client: "MlflowClient", name: str, uri: str) -> str:
    """The lock that the registered model names, `uri` if it named none.

    PostgreSQL refuses the second of two that write a tag for the first time; the first one's counts.
    """
    from mlflow.exceptions import MlflowException

    refusal: MlflowException | None = None
    try:
        client.set_registered_model_tag(name, LOCK_TAG, uri)
    except MlflowException as error:
        refusal = error
    agreed: str | None = client.get_registered_model(name).tags.get(LOCK_TAG)
    if agreed is None:
        raise refusal or UserError(f"registered model '{name}' lost its {LOCK_TAG} tag: run the step again")
    return agreed
