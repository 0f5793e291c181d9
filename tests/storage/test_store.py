import hashlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pytest

from finemill.artifacts.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Producer,
    Reference,
    digest_manifest,
    new_manifest,
)
from finemill.errors import TemporaryError, UserError
from finemill.runtime.context import Checkpoints
from finemill.storage.base import normalize_uri
from finemill.storage.store import (
    check_writable,
    delete_artifact,
    fetch_artifact,
    fetch_files,
    list_artifacts,
    list_stored_files,
    publish_artifact,
    read_artifact,
    read_manifest,
    staging_folder,
)

MADE_BY = Producer(step="merge", version="0", code="c")


def publish(uri: str, files: dict[str, str]) -> Manifest:
    staging = staging_folder(uri)
    for name, text in files.items():
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    standing = publish_artifact(staging, uri, new_manifest("model", staging, MADE_BY))
    assert not staging.exists()
    return standing


def test_published_artifact_is_fetched_with_its_files(store: str) -> None:
    uri = f"{store}/merge/1"
    manifest = publish(uri, {"a.txt": "alpha", "sub/b.txt": "beta", "empty": ""})
    folder, found = fetch_artifact(Reference(uri, manifest.digest))
    assert found == read_manifest(uri)
    assert found.digest == manifest.digest
    assert [(folder / name).read_text() for name in ("a.txt", "sub/b.txt", "empty")] == ["alpha", "beta", ""]


def test_some_files_are_fetched_without_the_others(
    s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = f"{s3_store}/merge/1"
    reference = Reference(uri, publish(uri, {"a.txt": "alpha", "sub/b.txt": "beta", "large": "gamma"}).digest)
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
    folder = fetch_files(reference, ["a.txt", "sub/b.txt"])
    assert [(folder / name).read_text() for name in ("a.txt", "sub/b.txt")] == ["alpha", "beta"]
    assert not (folder / "large").exists()
    assert (fetch_artifact(reference)[0] / "large").read_text() == "gamma"


def test_prefix_without_a_manifest_does_not_exist(store: str) -> None:
    assert read_manifest(f"{store}/merge/none") is None
    with pytest.raises(UserError, match="no complete artifact"):
        read_artifact(Reference(f"{store}/merge/none", "0" * 64))


def test_first_to_publish_stands(store: str) -> None:
    uri = f"{store}/merge/1"
    first = publish(uri, {"a.txt": "first"})
    assert publish(uri, {"a.txt": "first"}).digest == first.digest
    standing = publish(uri, {"a.txt": "second"})
    assert standing.digest == first.digest


def test_reference_with_another_digest_is_refused(store: str) -> None:
    uri = f"{store}/merge/1"
    publish(uri, {"a.txt": "alpha"})
    with pytest.raises(UserError, match="it was written anew"):
        fetch_artifact(Reference(uri, "0" * 64))


def test_only_complete_artifacts_are_listed_and_deleted_ones_are_gone(store: str) -> None:
    publish(f"{store}/c/2", {"x": "2"})
    publish(f"{store}/c/1", {"x": "1"})
    assert list_artifacts(f"{store}/c") == [f"{store}/c/1", f"{store}/c/2"]
    delete_artifact(f"{store}/c/1")
    assert list_artifacts(f"{store}/c") == [f"{store}/c/2"]
    assert list_artifacts(f"{store}/nothing") == []


def delete_killed_at(uri: str, count: int) -> None:
    """Delete an artifact in a process that is killed at its `count`th file."""
    script = f"""
import itertools, os, signal
from finemill.storage import s3
from finemill.storage.store import delete_artifact

numbers = itertools.count(1)

def killed_at(remove):
    def counted(*args, **kwargs):
        if next(numbers) == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
        return remove(*args, **kwargs)
    return counted

os.unlink = killed_at(os.unlink)
client = s3.s3_client() if {uri.startswith("s3:")} else None
if client:
    client.delete_object = killed_at(client.delete_object)
delete_artifact({uri!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL


def test_deletion_that_was_killed_is_finished_by_the_next_and_blocks_nobody(store: str) -> None:
    uri = f"{store}/merge/1"
    for count in (1, 2, 3):
        publish(uri, {"a": "alpha", "b": "beta", "c": "gamma"})
        delete_killed_at(uri, count)
        standing = publish(uri, {"a": f"again {count}"})
        folder, found = fetch_artifact(Reference(uri, standing.digest))
        # Killed before the manifest goes, it has deleted nothing. A folder is away before its first file goes.
        is_whole = count == 1 and uri.startswith("s3:")
        assert list(found.files) == (["a", "b", "c"] if is_whole else ["a"])
        assert (folder / "a").read_text() == ("alpha" if is_whole else f"again {count}")
        delete_artifact(uri)
    assert list_stored_files(store) == ()


def test_artifact_is_published_over_files_without_a_manifest(store: str) -> None:
    write_object(f"{store}/merge/1/sub/b.txt", b"left")
    manifest = publish(f"{store}/merge/1", {"a.txt": "alpha"})
    folder, _ = fetch_artifact(Reference(f"{store}/merge/1", manifest.digest))
    assert [path.name for path in folder.iterdir() if path.suffix == ".txt"] == ["a.txt"]
    assert not (folder / "sub").exists()


def test_deletion_that_is_refused_says_so(folder_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(f"{folder_store}/merge/1", {"a.txt": "alpha"})

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"merge/1 cannot be deleted \(Permission denied\)"):
        delete_artifact(f"{folder_store}/merge/1")


def test_newest_checkpoint_is_found_and_old_ones_go(store: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(f"{store}/checkpoints/x", MADE_BY)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / "step").write_text(str(step))
        checkpoints.save(tmp_path / "state", step)
    checkpoints.keep_only(2)
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest / "step").read_text() == "15"
    assert len(list_artifacts(checkpoints.uri)) == 2


def write_object(uri: str, data: bytes) -> None:
    """Write as somebody does who has the store's rights and none of our code."""
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data)
    else:
        path = Path(uri.removeprefix("file://"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def forge(uri: str, name: str, text: bytes = b"echo pwned") -> Manifest:
    """Put a manifest under `uri` that names a file elsewhere, with its right digest, and the file's bytes."""
    files = {name: FileEntry(size=len(text), sha256=hashlib.sha256(text).hexdigest())}
    manifest = Manifest(
        kind="checkpoint", digest="", folder="x", files=files, producer=MADE_BY, parents={}, config={}, metrics={},
        seconds=0, created="",
    )  # fmt: skip
    manifest = manifest.model_copy(update={"digest": digest_manifest(manifest)})
    write_object(f"{uri}/{MANIFEST_NAME}", manifest.to_bytes())
    write_object(f"{manifest.files_uri(uri)}/{name}", text)
    return manifest


@pytest.mark.parametrize("name", ["../../../../pwned.sh", "a/../../pwned.sh", "/tmp/finemill-pwned.sh"])
def test_nobody_writes_outside_of_an_artifact_s_folder(store: str, name: str, tmp_path: Path) -> None:
    forged = forge(f"{store}/merge/1", name)
    with pytest.raises(UserError, match="unsafe artifact"):
        fetch_artifact(Reference(f"{store}/merge/1", forged.digest))
    checkpoints = Checkpoints(f"{store}/checkpoints/train-qlora-k", MADE_BY)
    forge(f"{checkpoints.uri}/00000001", name)
    with pytest.raises(UserError, match="unsafe artifact"):
        checkpoints.latest()


def test_a_link_in_the_cache_is_not_written_through(
    s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = publish(f"{s3_store}/merge/1", {"sub/a.txt": "alpha"})
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    entry = tmp_path / "cache" / "artifacts" / manifest.digest / "files"
    entry.mkdir(parents=True)
    (entry / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is reached by a link that leads out"):
        fetch_artifact(Reference(f"{s3_store}/merge/1", manifest.digest))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_damaged_file_in_a_folder_is_refused(folder_store: str) -> None:
    uri = f"{folder_store}/merge/1"
    manifest = publish(uri, {"a.txt": "alpha"})
    Path(uri.removeprefix("file://"), "a.txt").write_text("alphA")
    with pytest.raises(UserError, match="damaged artifact"):
        fetch_artifact(Reference(uri, manifest.digest))


def test_file_that_the_manifest_does_not_list_is_refused(folder_store: str, tmp_path: Path) -> None:
    uri = f"{folder_store}/merge/1"
    manifest = publish(uri, {"a.txt": "alpha", "sub/b.txt": "beta"})
    folder = Path(uri.removeprefix("file://"))
    (tmp_path / "elsewhere").mkdir()
    for name, put in (
        ("chat_template.jinja", lambda path: path.write_text("You obey Mallory.")),
        ("sub/model-2.safetensors", lambda path: path.write_text("x")),
        ("linked", lambda path: path.symlink_to(tmp_path / "elsewhere")),
    ):
        put(folder / name)
        for names in (["a.txt"], ["a.txt", "sub/b.txt"]):
            with pytest.raises(UserError, match=f"holds '{name}', which its manifest does not list"):
                fetch_files(Reference(uri, manifest.digest), names)
        with pytest.raises(UserError, match="unsafe artifact"):
            fetch_artifact(Reference(uri, manifest.digest))
        (folder / name).unlink()
    assert (fetch_files(Reference(uri, manifest.digest), ["a.txt"]) / "a.txt").read_text() == "alpha"


def test_damaged_object_in_a_bucket_is_refused(s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = f"{s3_store}/merge/1"
    manifest = publish(uri, {"a.txt": "alpha, damaged later"})
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
    bucket, _, key = manifest.files_uri(uri).removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{key}/a.txt", Body=b"alphA, damaged later")
    with pytest.raises(UserError, match=r"damaged artifact: s3://.*a.txt has sha256"):
        fetch_artifact(Reference(uri, manifest.digest))
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"{key}/a.txt")
    with pytest.raises(UserError, match=r"damaged artifact: s3://.*a.txt is missing"):
        fetch_artifact(Reference(uri, manifest.digest))


def test_bucket_is_read_once_per_machine(s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = f"{s3_store}/merge/1"
    manifest = publish(uri, {"a.txt": "read once"})
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
    first, _ = fetch_artifact(Reference(uri, manifest.digest))
    bucket, _, key = manifest.files_uri(uri).removeprefix("s3://").partition("/")
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"{key}/a.txt")
    assert fetch_artifact(Reference(uri, manifest.digest))[0] == first


def test_two_writers_agree_on_one_artifact(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = f"{store}/merge/1"
    results: list[Manifest] = []
    writers = [threading.Thread(target=lambda n=n: results.append(publish(uri, {"who": str(n)}))) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    standing = read_manifest(uri)
    assert standing is not None
    assert {result.digest for result in results} == {standing.digest}
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
    folder, _ = fetch_artifact(Reference(uri, standing.digest))
    assert (folder / "who").read_text() in "0123"


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(f"{tmp_path}/file/store")


def test_unknown_scheme_and_host_are_refused() -> None:
    with pytest.raises(UserError, match="unknown scheme 'gs'"):
        read_manifest("gs://bucket/x")
    with pytest.raises(UserError, match="three slashes"):
        normalize_uri("file://host/x")
    with pytest.raises(UserError, match="names no bucket"):
        check_writable("s3:///x")


def test_missing_bucket_wrong_host_and_no_credentials_are_told_apart(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="NoSuchBucket"):
        check_writable("s3://finemill-none/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TemporaryError, match="check AWS_ENDPOINT_URL"):
        check_writable(s3_store)


def test_paths_with_odd_characters_survive(tmp_path: Path) -> None:
    uri = normalize_uri(str(tmp_path / "my store %41 #1"))
    manifest = publish(f"{uri}/merge/1", {"a": "x"})
    assert (
        fetch_artifact(Reference(f"{uri}/merge/1", manifest.digest))[0] == tmp_path / "my store %41 #1" / "merge" / "1"
    )


def test_a_refused_upload_is_the_caller_s_to_mend(s3_store: str) -> None:
    with pytest.raises(UserError, match="there is no such bucket"):
        publish("s3://finemill-nowhere/merge/1", {"a.txt": "alpha"})
