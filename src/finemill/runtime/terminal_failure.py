"""A failure that would only repeat itself, noted in the store for the next attempt of the same call."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from finemill.artifacts.manifest import Reference, new_manifest
from finemill.errors import StepError, kind_of
from finemill.runtime.catalog import get_step
from finemill.runtime.code_version import producer
from finemill.storage.base import normalize_uri
from finemill.storage.store import delete_artifact, fetch_artifact, publish_artifact, read_manifest, staging_folder

_ERROR_FILE = "error.json"


@dataclass(frozen=True)
class TerminalFailure:
    """The note that one call of a step leaves: the same step, arguments and run."""

    step: str
    uri: str

    @classmethod
    def of_call(
        cls, step: str, *, store: str, inputs: Mapping[str, str], config: Mapping[str, Any], run_id: str
    ) -> "TerminalFailure":
        """The note of this call; nothing is read or written yet."""
        call = json.dumps([step, run_id, dict(inputs), dict(config)], sort_keys=True, default=str)
        return cls(step, f"{normalize_uri(store)}/failures/{step}-{hashlib.sha256(call.encode()).hexdigest()[:20]}")

    def note(self, line: str, exit_code: int) -> None:
        """Leave the note. A store that cannot be written is no reason to hide the failure itself."""
        with suppress(Exception):
            staging = staging_folder(self.uri)
            (staging / _ERROR_FILE).write_text(json.dumps({"line": line, "exit_code": exit_code}))
            publish_artifact(staging, self.uri, new_manifest("failure", staging, producer(get_step(self.step))))

    def forget(self) -> None:
        """Remove the note of an earlier round of attempts: a person has asked for the run to be tried again."""
        try:
            delete_artifact(self.uri)
        except (StepError, OSError):
            return

    def raise_if_noted(self) -> None:
        """Raises: StepError: an attempt before this one failed in a way that would repeat itself; of the same kind."""
        manifest = read_manifest(self.uri)
        if manifest is not None:
            folder, _ = fetch_artifact(Reference(self.uri, manifest.digest))
            noted = json.loads((folder / _ERROR_FILE).read_text())
            raise kind_of(noted["exit_code"])(f"{noted['line']} (not tried again)")
