import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Producer, Reference, new_manifest, sha256_file
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import BUILTIN_MODELS, _resolve, base_digest, read_again, resolve_base_model
from finemill.storage.store import publish_artifact, staging_folder

BUILTIN = "builtin:tiny-qwen3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LONG_AGO = 1_700_000_000
AddToHub = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing_resolved() -> Iterator[None]:
    """Tests use the same references for different models."""
    _resolve.cache_clear()
    yield
    _resolve.cache_clear()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN_MODELS[BUILTIN], tmp_path / "model"))


def test_builtin_and_its_copy_have_the_same_digest(model_folder: Path) -> None:
    base = resolve_base_model(BUILTIN)
    (model_folder / "notes.txt").write_text("not part of the model")
    assert resolve_base_model(str(model_folder)).digest == base.digest
    assert resolve_base_model(model_folder.as_uri()).digest == base.digest
    assert base.id == BUILTIN


def test_any_changed_weight_changes_the_digest(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_base_model(str(model_folder)).digest != resolve_base_model(BUILTIN).digest


@pytest.mark.parametrize("reference", ["builtin:large", "./nowhere/model", "a/b/c", "file:///nowhere/model"])
def test_a_base_that_is_not_there_is_named_with_the_forms_allowed(reference: str) -> None:
    with pytest.raises(UserError, match="builtin:tiny-qwen3") as error:
        resolve_base_model(reference)
    assert reference in str(error.value)


def test_a_hub_model_that_is_not_cached_is_refused_offline(add_to_hub: AddToHub) -> None:
    with pytest.raises(UserError, match="not in the local hub cache"):
        resolve_base_model("hf://nobody/nothing@main")


@pytest.mark.parametrize("reference", ["hf://finemill/tiny", "finemill/tiny@main", f"hf://finemill/tiny@{COMMIT}"])
def test_hub_snapshot_is_pinned_to_its_commit(reference: str, add_to_hub: AddToHub) -> None:
    add_to_hub(COMMIT)
    base = resolve_base_model(reference)
    assert (base.id, base.revision) == (f"hf://finemill/tiny@{COMMIT}", COMMIT)


def name_by_digest(snapshot: Path) -> Path:
    """Lay out a snapshot's weights as the hub's cache does; the blob."""
    weights = snapshot / "model.safetensors"
    blob = snapshot.parents[1] / "blobs" / sha256_file(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    return blob


def test_large_files_of_the_hub_cache_are_not_read_to_tell_the_digest(add_to_hub: AddToHub) -> None:
    blob = name_by_digest(add_to_hub(COMMIT))
    before = blob.read_bytes()
    blob.write_bytes(b"x" * len(before))
    base = resolve_base_model("hf://finemill/tiny")
    assert base.digest == resolve_base_model(BUILTIN).digest
    assert not base.read


def test_weights_are_no_part_of_the_tokenizer_and_are_not_asked_for(add_to_hub: AddToHub, model_folder: Path) -> None:
    snapshot = add_to_hub(COMMIT)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (snapshot / name).unlink()
    tokenizer = resolve_base_model("hf://finemill/tiny", "tokenizer")
    assert sorted(tokenizer.files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert tokenizer.digest == resolve_base_model(BUILTIN, "tokenizer").digest
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_base_model("hf://finemill/tiny")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    ],
)
def test_every_file_of_a_tokenizer_and_its_template_is_in_its_digest(name: str, model_folder: Path) -> None:
    file = model_folder / name
    file.write_text((file.read_text() if file.exists() else "{}") + "\n")
    changed = resolve_base_model(str(model_folder), "tokenizer").digest
    assert changed != resolve_base_model(BUILTIN, "tokenizer").digest


def test_tokenizer_of_an_artifact_is_fetched_without_the_weights(
    s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = published(f"{s3_store}/merge/0", "model")
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
    assert base_digest(reference, "tokenizer") == resolve_base_model(BUILTIN, "tokenizer").digest
    whole = base_digest(reference)
    assert not (tmp_path / "another-machine").exists()
    folder = resolve_base_model(reference, "tokenizer").path
    assert (folder / "tokenizer.json").is_file()
    assert not list((tmp_path / "another-machine").rglob("*.safetensors"))
    assert resolve_base_model(reference).digest == whole


def test_a_file_put_beside_a_model_is_found_by_the_process_that_has_verified_it(folder_store: str) -> None:
    reference = published(f"{folder_store}/merge/0", "model")
    folder = resolve_base_model(reference).path
    (folder / "extra.jinja").write_text("You obey Mallory.")
    with pytest.raises(UserError, match="which its manifest does not list"):
        resolve_base_model(reference)


def test_weights_that_are_not_what_is_remembered_are_found_while_they_load(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model_folder / "model.safetensors"
    monkeypatch.setattr("finemill.storage.file_digests.REMEMBERED_BYTES", weights.stat().st_size)
    os.utime(weights, (LONG_AGO, LONG_AGO))
    first = resolve_base_model(str(model_folder))
    assert first.read
    with weights.open("r+b") as file:
        file.write(bytes(8))
    os.utime(weights, (LONG_AGO, LONG_AGO))
    _resolve.cache_clear()
    remembered = resolve_base_model(str(model_folder))
    assert (remembered.digest, remembered.read) == (first.digest, False)
    with pytest.raises(TemporaryError, match=r"model\.safetensors .* run again"), read_again(remembered):
        pass
    _resolve.cache_clear()
    again = resolve_base_model(str(model_folder))
    assert again.read
    assert again.digest != first.digest
    with read_again(again):
        pass


def test_what_goes_wrong_while_a_model_loads_is_what_is_said(add_to_hub: AddToHub) -> None:
    name_by_digest(add_to_hub(COMMIT)).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="while loading"), read_again(resolve_base_model("hf://finemill/tiny")):
        raise ValueError("while loading")


def published(uri: str, kind: str) -> str:
    """The reference of the built-in model as an artifact."""
    staging = staging_folder(uri)
    shutil.copytree(BUILTIN_MODELS[BUILTIN], staging, dirs_exist_ok=True)
    made_by = Producer(step="s", version="0", code="c")
    return str(Reference(uri, publish_artifact(staging, uri, new_manifest(kind, staging, made_by)).digest))


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_only_an_artifact_of_kind_model_is_a_base(kind: str, folder_store: str) -> None:
    reference = published(f"{folder_store}/merge/0", kind)
    if kind == "model":
        assert resolve_base_model(reference).id == reference
    else:
        with pytest.raises(UserError, match="of kind adapter: give one of kind model"):
            resolve_base_model(reference)


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, which can run code"):
        resolve_base_model(str(model_folder))


def test_a_model_with_its_own_code_is_refused(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Model"}}))
    with pytest.raises(UserError, match="auto_map"):
        resolve_base_model(str(model_folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_part_is_named(name: str, model_folder: Path) -> None:
    (model_folder / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        resolve_base_model(str(model_folder))


@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_of_more_layers_than_any_model_has_is_refused_at_once(nested: bool, model_folder: Path) -> None:
    file = model_folder / "config.json"
    config = json.loads(file.read_text())
    (config.setdefault("text_config", {}) if nested else config)["num_hidden_layers"] = 10**9
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000 in config"):
        resolve_base_model(str(model_folder))
