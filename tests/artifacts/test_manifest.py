from pathlib import Path

import pytest

from finemill.artifacts.manifest import (
    Manifest,
    Producer,
    Reference,
    digest_files,
    list_files,
    new_manifest,
    verify_folder,
)
from finemill.errors import UserError

MADE_BY = Producer(step="merge", version="0", code="c")


def write_folder(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.bin").write_bytes(b"\0\1")
    return folder


def test_reference_survives_its_own_text() -> None:
    reference = Reference("s3://bucket/merge/ab12", "0" * 64)
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize("text", ["", "s3://bucket/x", "s3://bucket/x@sha256:12", "x@sha256:" + "Z" * 64])
def test_reference_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no artifact reference"):
        Reference.parse(text)


def test_digest_depends_on_paths_and_contents_only(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "1"), write_folder(tmp_path / "2")
    assert digest_files(list_files(first)) == digest_files(list_files(second))
    (second / "sub" / "b.bin").rename(second / "b.bin")
    assert digest_files(list_files(first)) != digest_files(list_files(second))


def test_manifest_survives_its_own_bytes(tmp_path: Path) -> None:
    manifest = new_manifest(
        "model", write_folder(tmp_path / "1"), MADE_BY, metrics={"x": 1.5}, config={"dtype": "bf16"}
    )
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest


def test_edited_manifest_is_refused(tmp_path: Path) -> None:
    manifest = new_manifest("model", write_folder(tmp_path / "1"), MADE_BY)
    edited = manifest.to_bytes().replace(b'"size": 5', b'"size": 6')
    with pytest.raises(UserError, match="do not add up to its digest"):
        Manifest.from_bytes(edited, "here")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text("alph"), "has 4 bytes, its manifest says 5"),
        (lambda path: path.write_text("alpho"), "has sha256"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    folder = write_folder(tmp_path / "1")
    manifest = new_manifest("model", folder, MADE_BY)
    damage(folder / "a.txt")  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"damaged artifact: here/a.txt {message}"):
        verify_folder(folder, manifest, "here")
