"""What a step's function gets besides its folders and its configuration."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from finemill.artifacts.manifest import Manifest, Producer, Reference, new_manifest
from finemill.storage.store import (
    delete_artifact,
    fetch_artifact,
    list_artifacts,
    publish_artifact,
    read_manifest,
    staging_folder,
)
from finemill.tracking.settings import NOWHERE, Tracking


class Recorder(Protocol):
    """Where live metrics and progress go: MLflow, the progress display, or nowhere."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of one training step."""

    def log_progress(self, text: str) -> None:
        """Show one short line about where the step is; the newest replaces the one before."""


class Unheard:
    """A recorder for a process that another one speaks for."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Discard them: the other process records its own."""

    def log_progress(self, text: str) -> None:
        """Discard it."""


@dataclass(frozen=True)
class Checkpoints:
    """Resumable states of one step run, as artifacts `<uri>/<training step, eight digits>` in the store."""

    uri: str
    producer: Producer
    parents: Mapping[str, str] = field(default_factory=dict)
    """References of the inputs, by port: as long as a checkpoint is kept, so is what its training goes on with."""

    def save(self, folder: Path, training_step: int) -> None:
        """Publish a copy of `folder`. An interruption leaves either nothing or all of it."""
        target = f"{self.uri}/{training_step:08d}"
        staging = staging_folder(target)
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        publish_artifact(staging, target, new_manifest("checkpoint", staging, self.producer, parents=self.parents))

    def latest(self) -> Path | None:
        """The newest complete checkpoint as a verified local folder, read only."""
        uris = list_artifacts(self.uri)
        if not uris:
            return None
        manifest = read_manifest(uris[-1])
        return fetch_artifact(Reference(uris[-1], manifest.digest))[0] if manifest else None

    def keep_only(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints."""
        uris = list_artifacts(self.uri)
        for uri in uris[: len(uris) - count]:
            delete_artifact(uri)


@dataclass(frozen=True)
class StepContext:
    """References and manifests of the inputs, the checkpoint store, where to record progress, and where MLflow is."""

    store: str
    key: str
    references: Mapping[str, str]
    manifests: Mapping[str, Manifest]
    checkpoints: Checkpoints
    recorder: Recorder
    run_id: str | None = None
    tracking: Tracking = NOWHERE
    state: Mapping[str, str] = field(default_factory=dict)
