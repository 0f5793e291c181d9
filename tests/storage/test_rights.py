import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Producer, Reference, new_manifest
from finemill.storage.store import fetch_artifact, publish_artifact, staging_folder

MADE_BY = Producer(step="merge", version="0", code="c")


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_artifacts_have_the_rights_that_the_umask_gives(
    umask: int, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "cache"))
    uri = f"{store}/merge/rights-{umask}"
    folder = staging_folder(uri)
    (folder / "sub").mkdir(0o700)
    # safetensors writes through a temporary file, which is its owner's alone.
    (folder / "sub" / "model").touch(0o600)
    manifest = publish_artifact(folder, uri, new_manifest("model", folder, MADE_BY))
    place, _ = fetch_artifact(Reference(uri, manifest.digest))
    modes = {path.relative_to(place).as_posix(): path.stat().st_mode & 0o777 for path in (place, *place.rglob("*"))}
    assert {modes["."], modes["sub"]} == {0o777 & ~umask}
    assert modes["sub/model"] == 0o666 & ~umask


def test_a_group_s_folder_hands_its_group_on(folder_store: str, tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    (tmp_path / "team").chmod(0o2775)
    uri = (tmp_path / "team" / "merge" / "a").as_uri()
    folder = staging_folder(uri)
    publish_artifact(folder, uri, new_manifest("model", folder, MADE_BY))
    assert (tmp_path / "team" / "merge" / "a").stat().st_mode & 0o2000
