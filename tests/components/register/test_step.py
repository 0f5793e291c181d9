import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from finemill.artifacts.manifest import Reference
from finemill.artifacts.version import read_version
from finemill.components.register.config import RegisterConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.registry.snapshot import _read_client, read_registered_model
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact
from finemill.tracking.settings import Tracking

Trained = Callable[..., dict[str, str]]


def register(store: str, inputs: dict[str, str], **config: object) -> StepResult:
    return run_step(
        "register", store=store, inputs=inputs, config=config, run_id="run-1", tracking=Tracking.of_environment()
    )


def test_version_points_to_the_merged_model_and_tells_what_it_is(
    tracking_uri: str, folder_store: str, trained: Trained
) -> None:
    line = trained("one")
    result = register(folder_store, line, registered_model_name="math", tags={"ticket": "ML-7"})
    record = read_version(fetch_artifact(result.reference)[0])
    client = MlflowClient(tracking_uri)
    version = client.get_model_version_by_alias("math", "challenger")
    assert (record.version, int(version.version)) == (1, 1)
    assert f"{version.source}@" in line["model"].replace("@sha256", "@")
    assert version.tags["base_model.id"] == "builtin:tiny-qwen3"
    assert version.tags["dataset.digest"] == b"first".hex().ljust(64, "0")
    assert version.tags["eval/tuned/exact_match"] == "0.9"
    assert version.tags["ticket"] == "ML-7"
    assert {version.tags[f"finemill.artifact.{port}"] for port in line} == set(line.values())
    assert "| exact_match | 0.1 | 0.9 |" in (version.description or "")
    assert version.run_id
    parent = client.get_run(version.run_id)
    assert parent.data.tags["finemill.run_id"] == "run-1"
    assert result.manifest.metrics == {"register/version": 1.0}


def test_registering_a_model_does_not_fetch_it(
    tracking_uri: str, s3_store: str, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = trained("one", store=s3_store)
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
    version = register(s3_store, line).manifest
    cached = [path.name for path in (tmp_path / "another-machine" / "artifacts").iterdir()]
    assert Reference.parse(line["model"]).digest not in cached
    assert version.digest in cached


def test_retry_after_an_interruption_creates_no_second_version(
    tracking_uri: str, folder_store: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = trained("one")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            register(folder_store, line)
    result = register(folder_store, line)
    assert result.manifest.metrics["register/version"] == 1
    client = MlflowClient(tracking_uri)
    assert [version.version for version in client.search_model_versions("name = 'finemill'")] == [1]
    assert client.get_model_version_by_alias("finemill", "challenger").version == 1


def test_registered_again_is_reused_and_other_artifacts_are_another_version(
    tracking_uri: str, folder_store: str, trained: Trained
) -> None:
    first, second = trained("one"), trained("two")
    results = [register(folder_store, line) for line in (first, first, second, first, second)]
    assert [result.reused for result in results] == [False, True, False, True, True]
    assert [result.manifest.metrics["register/version"] for result in results] == [1, 1, 2, 1, 2]


def test_version_that_was_deleted_is_registered_anew(tracking_uri: str, folder_store: str, trained: Trained) -> None:
    line = trained("one")
    register(folder_store, line)
    MlflowClient(tracking_uri).delete_model_version("finemill", "1")
    again = register(folder_store, line)
    assert (again.reused, again.manifest.metrics["register/version"]) == (False, 2)


def test_empty_registry_gets_the_version_although_the_store_has_the_record(
    tracking_uri: str, empty_database: Path, tmp_path: Path, folder_store: str, trained: Trained
) -> None:
    line = trained("one")
    register(folder_store, line)
    with sqlite3.connect(tmp_path / "mlflow.db") as database, sqlite3.connect(empty_database) as empty:
        empty.backup(database)
    assert not register(folder_store, line).reused
    assert MlflowClient(tracking_uri).get_model_version_by_alias("finemill", "challenger").version


def test_artifacts_of_two_lines_are_refused(tracking_uri: str, folder_store: str, trained: Trained) -> None:
    mixed = {**trained("one"), "evaluation": trained("two")["evaluation"]}
    with pytest.raises(UserError, match=r"the evaluation was made from the adapter .* artifacts of one line"):
        register(folder_store, mixed)


def test_without_a_tracking_server_the_line_says_so(folder_store: str, trained: Trained) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        register(folder_store, trained("one"))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen:Qwen3-0.6B", "Qwen 'Qwen3-0.6B"])
def test_name_that_mlflow_or_its_searches_cannot_take_is_refused_with_a_better_one(name: str) -> None:
    with pytest.raises(UserError, match=r"has letters, digits, \. _ - only; write Qwen-Qwen3-0\.6B"):
        parse_config(RegisterConfig, {"registered_model_name": name}, "register")


def test_database_read_directly_says_what_mlflow_says(tracking_uri: str, folder_store: str, trained: Trained) -> None:
    for name in ("one", "two", "three"):
        register(folder_store, trained(name))
    client = MlflowClient(tracking_uri)
    client.set_registered_model_alias("finemill", "champion", "2")
    client.delete_model_version("finemill", "1")
    direct = read_registered_model(tracking_uri, "finemill")
    assert direct == _read_client(client, tracking_uri, "finemill")
    assert direct is not None
    assert sorted(direct.versions) == [2, 3]
    assert direct.lock_uri == f"{folder_store}/locks/registered-model-finemill.lock"
    assert read_registered_model(tracking_uri, "unknown") is None
