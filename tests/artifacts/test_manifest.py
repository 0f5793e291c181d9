import json
from pathlib import Path

import pytest

from finemill.artifacts.manifest import (
    Manifest,
    Producer,
    Reference,
    check_names,
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


@pytest.mark.parametrize("text", ["", "s3://bucket/x", "s3://bucket/x@sha256:12", "x@sha256:" + "Z" * 64, "x\ny"])
def test_reference_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no artifact reference") as refused:
        Reference.parse(text)
    assert "\n" not in str(refused.value)


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


def edited(manifest: Manifest, **changes: object) -> bytes:
    return json.dumps({**json.loads(manifest.to_bytes()), **changes}).encode()


DATASET = f"file:///data@sha256:{'0' * 64}"
FORGERIES: tuple[dict[str, object], ...] = (
    {"kind": "adapter"},
    {"files": {"a.txt": {"size": 6, "sha256": "0" * 64}}},
    {"metrics": {"eval/tuned/loss": 0.001}},
    {"metrics": {}},
    {"parents": {"dataset": DATASET.replace("0", "1"), "base_model": "builtin:tiny-qwen3"}},
    {"parents": {"dataset": DATASET, "base_model": "builtin:other"}},
    {"config": {"seed": 9}},
    {"warnings": []},
    {"producer": {"step": "merge", "version": "0", "code": "c", "git_sha": "forged"}},
    {"digest": "0" * 64},
)


@pytest.mark.parametrize("forgery", FORGERIES, ids=[next(iter(forgery)) for forgery in FORGERIES])
def test_edited_manifest_is_refused(tmp_path: Path, forgery: dict[str, object]) -> None:
    manifest = new_manifest(
        "model", write_folder(tmp_path / "1"), MADE_BY, metrics={"eval/tuned/loss": 2.0}, config={"seed": 1},
        parents={"dataset": DATASET, "base_model": "builtin:tiny-qwen3"}, warnings=["two rows left out"],
    )  # fmt: skip
    with pytest.raises(UserError, match="does not add up to its digest"):
        Manifest.from_bytes(edited(manifest, **forgery), "here")


def test_digest_does_not_tell_when_where_and_how_fast_it_was_made(tmp_path: Path) -> None:
    first, second = (
        new_manifest(
            "model", write_folder(tmp_path / name), MADE_BY, seconds=len(name), config={"x": (1, 2.0)},
            metrics={"train/loss": 1.0, "train/tokens_per_second": float(len(name))},
            parents={"dataset": f"file:///{name}@sha256:{'0' * 64}"},
        )
        for name in ("1", "two")
    )  # fmt: skip
    assert first.digest == second.digest
    assert Manifest.from_bytes(edited(first, folder="x", created="then"), "here").digest == first.digest


def test_an_artifact_of_another_layout_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    manifest = new_manifest("model", write_folder(tmp_path / "1"), MADE_BY)
    with pytest.raises(UserError, match="here is an artifact of layout 3, and this version of finemill reads layout 2"):
        Manifest.from_bytes(edited(manifest, layout=3, files=[], weights="another form"), "here")
    for damaged in (b"", b"[]", b'{"layout": 2}', b'{"layout": {}}', b"[" * 100_000):
        with pytest.raises(UserError, match=r"damaged artifact: here/manifest\.json is not a manifest;"):
            Manifest.from_bytes(damaged, "here")


UNSAFE_NAMES = (
    "", "/etc/passwd", "../x", "a/../../x", "a/..", "a/./b", ".", "./a", "a//b", "a/", "a\\b", "..\\x", "C:/x", "c:x",
    "a/D:/x", "a\nb", "a\0b", "a" * 256, "ä" * 128,
    "manifest.json", "manifest.json/a", "/".join(["a" * 200] * 6),
)  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_names_that_leave_the_folder_are_refused_when_read(tmp_path: Path, name: str) -> None:
    manifest = new_manifest("model", write_folder(tmp_path / "1"), MADE_BY)
    files = {name: manifest.files["a.txt"]}
    entries = {name: {"size": 5, "sha256": manifest.files["a.txt"].sha256}}
    with pytest.raises(UserError, match=r"unsafe artifact: here/manifest\.json names ") as error:
        Manifest.from_bytes(edited(manifest, files=entries, digest=digest_files(files)), "here")
    assert "\n" not in str(error.value)
    if name:
        with pytest.raises(UserError, match="unsafe artifact"):
            Manifest.from_bytes(edited(manifest, folder=name), "here")


def test_a_name_is_a_file_or_a_folder_not_both() -> None:
    with pytest.raises(UserError, match="names 'a/b'"):
        check_names(["a/b", "a/b/c"], "here")


def test_every_other_name_is_taken(tmp_path: Path) -> None:
    check_names(
        [
            "a",
            "a.b/c",
            ".hidden",
            "..a/b..",
            "sub dir/ü.txt",
            "xy:z",
            "b/manifest.json",
            "model-00001-of-00002.safetensors",
        ],
        "here",
    )


def test_a_file_with_an_unsafe_name_is_not_published(tmp_path: Path) -> None:
    write_folder(tmp_path / "1")
    (tmp_path / "1" / "a\\b").write_text("")
    with pytest.raises(UserError, match="unsafe artifact"):
        new_manifest("model", tmp_path / "1", MADE_BY)


@pytest.mark.parametrize("linked", ["a.txt", "sub"])
def test_a_link_that_leaves_the_folder_is_not_followed(tmp_path: Path, linked: str) -> None:
    folder = write_folder(tmp_path / "1")
    manifest = new_manifest("model", folder, MADE_BY)
    (folder / linked).rename(tmp_path / "elsewhere")
    (folder / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"unsafe artifact: here/{linked}.* is reached by a link that leads out"):
        verify_folder(folder, manifest, "here")
    (folder / linked).unlink()
    (tmp_path / "elsewhere").rename(folder / "inside")
    (folder / linked).symlink_to("inside")
    verify_folder(folder, manifest, "here")


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
