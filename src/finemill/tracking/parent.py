"""The parent run of a pipeline in a cluster: steps in separate pods agree on one without talking to each other."""

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING

from finemill.artifacts.manifest import Producer, Reference, new_manifest
from finemill.credentials import without_credentials
from finemill.storage.store import delete_artifact, fetch_artifact, publish_artifact, read_manifest, staging_folder
from finemill.tracking.abandoned import end_abandoned_runs
from finemill.tracking.describe import RUN_ID_TAG, StepDescription
from finemill.tracking.record import PARENT_TAG, StepRecord
from finemill.tracking.server import find_experiment
from finemill.tracking.settings import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RUN_ID_FILE = "mlflow_run_id"


def start_step(
    client: "MlflowClient", tracking: Tracking, store: str, made_by: Producer, step: StepDescription
) -> StepRecord:
    """The run that a step in this process records into.

    A run may be adopted: KFP's MLflow plugin starts one per task, nested already, which is the step's own; one that is
    not nested is the pipeline's, and the step's goes under it.
    """
    adopted = tracking.adopted_run
    if adopted:
        run = client.get_run(adopted)
        if PARENT_TAG in run.data.tags:
            record = StepRecord(client, adopted, run.data.tags[PARENT_TAG], owned=False)
            record.log_params(step.params)
            for key, value in step.tags.items():
                client.set_tag(adopted, key, value)
            return record
        return StepRecord.start(client, run.info.experiment_id, adopted, step)
    experiment = find_experiment(client, tracking)
    end_abandoned_runs(client, experiment)
    parent = _find_or_create(client, experiment, tracking.runs, store, made_by, step) if step.run_id else None
    return StepRecord.start(client, experiment, parent, step)


def follow_steps(client: "MlflowClient", tracking: Tracking, record: StepRecord) -> None:
    """Give a parent run that no process watches over the state of its steps: running, failed, or finished."""
    if record.parent_id is None or tracking.adopted_run:
        return
    parent = client.get_run(record.parent_id)
    nested = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{record.parent_id}'")
    # A step that was tried again has a run per attempt; its newest, which comes first, counts.
    newest: dict[str, str] = {}
    for run in nested:
        newest.setdefault(run.info.run_name, run.info.status)
    for status in ("RUNNING", "FAILED", "KILLED"):
        if status in newest.values():
            break
    else:
        status = "FINISHED"
    if status == "RUNNING":
        client.update_run(record.parent_id, status=status)
    else:
        client.set_terminated(record.parent_id, status)


def _find_or_create(
    client: "MlflowClient", experiment: str, uri: str, store: str, made_by: Producer, step: StepDescription
) -> str:
    """The parent run of the pipeline run `step.run_id`.

    MLflow cannot create a run only if there is none yet, but the store can: the first step to publish a run's id there
    has created the parent. Whoever comes second deletes his own.
    """
    place = hashlib.sha256(f"{without_credentials(uri)} {experiment} {step.run_id}".encode()).hexdigest()[:20]
    record_uri = f"{store}/runs/{place}"
    standing = _published(record_uri)
    if standing is not None and _exists(client, standing):
        client.update_run(standing, status="RUNNING")
        return standing
    if standing is not None:
        delete_artifact(record_uri)
    tags = {RUN_ID_TAG: str(step.run_id)}
    created = client.create_run(experiment, run_name=str(step.run_id), tags=tags).info.run_id
    folder = staging_folder(record_uri)
    (folder / _RUN_ID_FILE).write_text(created)
    publish_artifact(folder, record_uri, new_manifest("run", folder, made_by))
    winner = _published(record_uri) or created
    if winner != created:
        client.delete_run(created)
    return winner


def _published(uri: str) -> str | None:
    manifest = read_manifest(uri)
    if manifest is None:
        return None
    return (fetch_artifact(Reference(uri, manifest.digest))[0] / _RUN_ID_FILE).read_text()


def _exists(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    return False
