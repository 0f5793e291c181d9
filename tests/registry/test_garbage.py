"""Only what nothing needs is garbage, in a folder and in a bucket."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from finemill.artifacts.decision import Decision, write_decision
from finemill.artifacts.manifest import Producer, Reference, new_manifest
from finemill.cli import main
from finemill.errors import UserError
from finemill.registry.garbage import find_garbage, find_leftovers
from finemill.runtime.context import Checkpoints
from finemill.storage.base import local_path
from finemill.storage.store import (
    delete_artifact,
    list_artifacts,
    publish_artifact,
    read_manifest,
    staging_folder,
)

ANY_AGE = timedelta(days=-1)


def put(
    store: str,
    place: str,
    parents: dict[str, str] | None = None,
    write: Callable[[Path], None] = lambda folder: None,
    config: dict[str, object] | None = None,
) -> str:
    uri = f"{store}/{place}"
    staging = staging_folder(uri)
    (staging / "file").write_text(place)
    write(staging)
    made_by = Producer(step=place.split("/")[0], version="0", code="c")
    manifest = publish_artifact(staging, uri, new_manifest("any", staging, made_by, parents=parents, config=config))
    return str(Reference(uri, manifest.digest))


def places(store: str, registered: list[str], older_than: timedelta) -> set[str]:
    found = find_garbage(store, [Reference.parse(text) for text in registered], older_than)
    return {artifact.uri.removeprefix(f"{store}/") for artifact in found}


def age(folder_store: str, days: int) -> None:
    """Have every file of a store last written that long ago."""
    then = time.time() - days * 86400
    for path in local_path(folder_store).rglob("*"):
        os.utime(path, (then, then))


def test_what_registered_versions_were_made_from_is_kept(store: str) -> None:
    rows = put(store, "data-prep/a")
    dataset = put(store, "chat-format/a", {"rows": rows, "base_model": "builtin:tiny-qwen3"})
    adapter = put(store, "train-qlora/a", {"dataset": dataset, "base_model": "builtin:tiny-qwen3"})
    put(store, "train-qlora/b", {"dataset": dataset})
    put(store, "checkpoints/train-qlora-b/00000004")
    put(store, "failures/eval-b")
    garbage = {"train-qlora/b", "checkpoints/train-qlora-b/00000004", "failures/eval-b"}
    assert places(store, [adapter], ANY_AGE) == garbage
    assert places(store, [], ANY_AGE) == garbage | {"data-prep/a", "chat-format/a", "train-qlora/a"}


def test_what_a_configuration_names_is_kept_as_parents_are(store: str) -> None:
    first, second = put(store, "train-qlora/a"), put(store, "train-qlora/b")
    config = {"further_adapters": [{"adapter": second, "scale": 0.5}], "seed": 1, "name": "x@sha256:1"}
    merged = put(store, "merge/a", {"adapter": first}, config=config)
    assert places(store, [merged], ANY_AGE) == set()


def test_an_address_with_a_space_names_what_is_kept(store: str) -> None:
    first, second = (put(store, place).replace(store, "/old disk") for place in ("train-qlora/a", "train-qlora/b"))
    merged = put(store, "merge/a", {"adapter": first}, config={"further_adapters": [{"adapter": second}]})
    assert places(store, [merged], ANY_AGE) == set()


def test_a_decision_about_what_is_registered_is_kept_with_the_scores_that_it_names(store: str) -> None:
    adapter = put(store, "train-qlora/a")
    evaluation, champion = put(store, "eval/a", {"adapter": adapter}), put(store, "eval/champion")
    parents = {"version": put(store, "register/a", {"adapter": adapter}), "evaluation": evaluation}
    decision = Decision(
        registered_model_name="m", version=2, champion_before=1, promoted=True, summary="", confidence=0.95, gates=(),
        evaluation=evaluation, champion_evaluation=champion,
    )  # fmt: skip
    put(store, "promote/a", parents, lambda folder: write_decision(folder, decision))
    put(store, "promote/b", {"evaluation": put(store, "eval/b")}, lambda folder: write_decision(folder, decision))
    assert places(store, [adapter, evaluation], ANY_AGE) == {"promote/b", "eval/b"}


def test_what_a_training_goes_on_with_is_kept_with_its_checkpoint(store: str, tmp_path: Path) -> None:
    dataset = put(store, "chat-format/a", {"rows": put(store, "data-prep/a")})
    made_by = Producer(step="train-qlora", version="0", code="c")
    (tmp_path / "state").mkdir()
    Checkpoints(f"{store}/checkpoints/train-qlora-b", made_by, {"dataset": dataset}).save(tmp_path / "state", 4)
    assert places(store, [], timedelta(days=1)) == set()
    checkpoint = [Reference(f"{store}/checkpoints/train-qlora-b/00000004", "0" * 64)]
    assert find_garbage(store, [], ANY_AGE, in_use=checkpoint) == []


def test_what_is_young_is_kept_with_what_it_was_made_from(store: str) -> None:
    put(store, "chat-format/new", {"rows": put(store, "data-prep/a")})
    assert places(store, [], timedelta(days=1)) == set()


def test_what_is_registered_is_kept_in_a_store_that_was_moved(folder_store: str, tmp_path: Path) -> None:
    rows = put(folder_store, "data-prep/a")
    adapter = put(folder_store, "train-qlora/a", {"dataset": put(folder_store, "chat-format/a", {"rows": rows})})
    put(folder_store, "merge/old")
    moved = shutil.copytree(local_path(folder_store), tmp_path / "moved").as_uri()
    assert places(moved, [adapter], ANY_AGE) == {"merge/old"}
    (local_path(moved) / "merge" / "old").rename(local_path(moved) / "merge" / "renamed")
    (local_path(moved) / "train-qlora" / "a").rename(local_path(moved) / "train-qlora" / "b")
    assert places(moved, [adapter], ANY_AGE) == {"merge/renamed"}


def test_nothing_is_deleted_where_the_registry_names_nothing_of_what_was_registered(store: str) -> None:
    put(store, "register/a", {"model": put(store, "merge/a")})
    elsewhere = f"file:///other/merge/b@sha256:{'0' * 64}"
    for registered in ([], [elsewhere]):
        with pytest.raises(UserError, match="the registry names nothing in this store: set MLFLOW_TRACKING_URI"):
            places(store, registered, ANY_AGE)


def test_nothing_is_deleted_while_a_needed_manifest_is_damaged(folder_store: str) -> None:
    adapter = put(folder_store, "train-qlora/a", {"dataset": put(folder_store, "chat-format/a")})
    (local_path(folder_store) / "train-qlora" / "a" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="made from is not known, and nothing is deleted"):
        places(folder_store, [adapter], ANY_AGE)
    assert places(folder_store, [], ANY_AGE) == {"train-qlora/a", "chat-format/a"}


def test_a_clock_that_is_ahead_makes_nothing_old(folder_store: str) -> None:
    put(folder_store, "merge/a")
    put(folder_store, "checkpoints/train-qlora-b/00000004")
    age(folder_store, 400)
    assert places(folder_store, [], timedelta(days=1)) == set()


def test_attempts_that_died_are_garbage_and_other_things_in_a_store_are_not(folder_store: str) -> None:
    put(folder_store, "merge/a")
    root = local_path(folder_store)
    (root / "logs").mkdir()
    (root / "logs" / "finetune.log").write_text("x")
    (root / "mlflow.db").write_text("x")
    half = root / "merge" / ".staging" / "b-0123" / "half"
    half.parent.mkdir(parents=True)
    half.write_text("x")
    assert places(folder_store, [], ANY_AGE) == {"merge/a"}
    (died,) = find_leftovers(folder_store, ANY_AGE)
    assert (died.place, died.size_bytes) == ("merge/.staging/b-0123", 1)
    assert find_leftovers(folder_store, timedelta(days=1)) == []


def test_what_a_living_process_prepares_is_no_leftover(folder_store: str) -> None:
    staging_folder(f"{folder_store}/merge/b")
    assert find_leftovers(folder_store, ANY_AGE) == []


def test_leftovers_of_killed_steps_go_without_a_registry(folder_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import sys; from finemill.storage.store import staging_folder; staging_folder(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, f"{folder_store}/merge/b"], check=True)
    published = local_path(put(folder_store, "data-prep/a").partition("@")[0])
    age(folder_store, 40)
    assert main(["gc", "--store", folder_store]) == 2
    shown = capsys.readouterr()
    assert "(unfinished)" in shown.out
    assert "there is no registry" in shown.err
    assert list((local_path(folder_store) / "merge" / ".staging").iterdir()) == []
    assert published.is_dir()


def test_unfinished_upload_is_garbage(s3_store: str) -> None:
    import boto3

    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/merge/b/0123/model.safetensors", Body=b"half")
    (found,) = find_garbage(s3_store, [], ANY_AGE)
    assert (found.uri, found.size_bytes, found.complete) == (f"{s3_store}/merge/b", 4, False)
    delete_artifact(found.uri)
    assert find_garbage(s3_store, [], ANY_AGE) == []


def test_gc_asks_the_registry_and_deletes_the_rest(
    tracking_uri: str,
    folder_store: str,
    publish: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    kept, dropped = put(folder_store, "merge/kept"), put(folder_store, "merge/dropped")
    client = MlflowClient(tracking_uri)
    client.create_registered_model("tuned")
    client.create_model_version("tuned", "file:///model", tags={"finemill.artifact.model": kept})
    age(folder_store, 40)
    put(folder_store, "merge/young")
    assert main(["gc", "--store", folder_store, "--dry-run"]) == 0
    assert "1 artifacts, 0.000 GiB, would be deleted" in capsys.readouterr().out
    assert main(["gc", "--store", folder_store]) == 0
    assert Reference.parse(dropped).uri in capsys.readouterr().out
    assert list_artifacts(f"{folder_store}/merge") == [
        Reference.parse(kept).uri,
        f"{folder_store}/merge/young",
    ]


def test_gc_keeps_what_running_steps_were_given(
    tracking_uri: str, folder_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    rows = put(folder_store, "data-prep/a")
    for name in ("used", "done"):
        put(folder_store, f"chat-format/{name}", {"rows": rows} if name == "used" else {})
    age(folder_store, 40)
    client, references = MlflowClient(tracking_uri), {}
    for uri in list_artifacts(f"{folder_store}/chat-format"):
        manifest = read_manifest(uri)
        assert manifest is not None
        references[uri.rpartition("/")[2]] = str(Reference(uri, manifest.digest))
    for name, reference in references.items():
        run = client.create_run(
            "0", tags={"finemill.input.dataset": reference, "finemill.input.base_model": "hf://a/b"}
        )
        if name == "done":
            client.set_terminated(run.info.run_id)
    put(folder_store, "merge/young")
    assert main(["gc", "--store", folder_store]) == 0
    assert "1 artifacts" in capsys.readouterr().out
    assert [uri.rpartition("/")[2] for uri in list_artifacts(f"{folder_store}/chat-format")] == ["used"]
    assert list_artifacts(f"{folder_store}/data-prep")


def test_two_gc_at_once_delete_everything_once(folder_store: str) -> None:
    """Folders vanish while the other one looks at them."""
    for number in range(30):
        put(folder_store, f"merge/{number}")
    faults: list[Exception] = []

    def collect() -> None:
        try:
            for artifact in find_garbage(folder_store, [], ANY_AGE):
                delete_artifact(artifact.uri)
            for artifact in find_leftovers(folder_store, ANY_AGE):
                delete_artifact(artifact.uri)
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=collect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert places(folder_store, [], ANY_AGE) == set()


def test_leftovers_are_as_old_as_the_store_s_own_clock_says(folder_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half = local_path(folder_store) / "merge" / ".staging" / "b-0123"
    half.mkdir(parents=True)

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Ahead":
            return super().now(tz) + timedelta(days=400)

    monkeypatch.setattr("finemill.registry.garbage.datetime", Ahead)
    assert find_leftovers(folder_store, timedelta(days=30)) == []
    assert find_leftovers(folder_store, ANY_AGE)


@pytest.mark.parametrize("days", ["nan", "inf", "0", "1e10"])
def test_days_that_are_no_age_are_refused(days: str, folder_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--store", folder_store, "--older-than-days", days]) == 2
    assert "--older-than-days" in capsys.readouterr().err


def test_gc_makes_no_registry_where_a_run_had_another(folder_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder_store, "merge/a")
    age(folder_store, 40)
    put(folder_store, "merge/young")
    assert main(["gc", "--store", folder_store]) == 2
    assert "MLFLOW_TRACKING_URI is not set, and there is no registry in" in capsys.readouterr().err
    assert len(list_artifacts(f"{folder_store}/merge")) == 2
    assert not (local_path(folder_store) / "mlflow.db").exists()


def test_gc_without_a_registry_deletes_nothing(s3_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(s3_store, "merge/a")
    assert main(["gc", "--store", s3_store, "--older-than-days", "1"]) == 2
    assert "MLFLOW_TRACKING_URI is not set" in capsys.readouterr().err
    assert list_artifacts(f"{s3_store}/merge")
