from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.change import read_change
from finemill.artifacts.manifest import Reference, new_manifest
from finemill.registry.snapshot import DIGEST_TAG
from finemill.runtime.catalog import STEPS
from finemill.runtime.code_version import producer
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact, publish_artifact, staging_folder
from finemill.tracking.settings import Tracking

CONFIG = {"registered_model_name": "tuned"}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client, with an empty registered model."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(uri)
    client.create_registered_model("tuned")
    return client


def dataset(store: str, text: str) -> Reference:
    """A dataset as far as the comparison looks at it: its digest."""
    uri = f"{store}/chat-format/{text}"
    folder = staging_folder(uri)
    (folder / "train.parquet").write_text(text)
    manifest = publish_artifact(folder, uri, new_manifest("dataset", folder, producer(STEPS["chat-format"])))
    return Reference(uri, manifest.digest)


def register(client: Any, trained_on: Reference, number: int) -> None:
    tags = {"dataset.digest": trained_on.digest, DIGEST_TAG: str(number)}
    client.create_model_version("tuned", f"file:///models/{number}", tags=tags)


def detect(store: str, given: Reference) -> StepResult:
    return run_step(
        "detect-change", store=store, inputs={"dataset": str(given)}, config=CONFIG, tracking=Tracking.of_environment()
    )


def changed(result: StepResult) -> bool:
    change = read_change(fetch_artifact(result.reference)[0])
    assert float(change.changed) == result.manifest.metrics["detect_change/changed"]
    return change.changed


def test_only_the_newest_version_s_data_is_nothing_new(registry: Any, folder_store: str) -> None:
    monday, tuesday = dataset(folder_store, "monday"), dataset(folder_store, "tuesday")
    assert changed(detect(folder_store, monday))
    register(registry, monday, 1)
    assert not changed(detect(folder_store, monday))
    assert changed(detect(folder_store, tuesday))
    register(registry, tuesday, 2)
    assert not changed(detect(folder_store, tuesday))
    assert changed(detect(folder_store, monday))


def test_the_same_question_is_answered_from_the_store_until_a_version_is_registered(
    registry: Any, folder_store: str
) -> None:
    given = dataset(folder_store, "monday")
    assert [detect(folder_store, given).reused for _ in range(2)] == [False, True]
    register(registry, given, 1)
    assert not detect(folder_store, given).reused


def test_a_model_that_is_not_registered_yet_means_everything_is_new(
    tmp_path: Path, folder_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    monkeypatch.chdir(tmp_path)
    assert changed(detect(folder_store, dataset(folder_store, "monday")))
