import json
import shutil
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Producer, Reference, new_manifest, sha256_file
from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS, resolve_base_model
from finemill.storage.store import publish_artifact, staging_folder

BUILTIN = "builtin:tiny-qwen3"


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


def test_a_hub_model_that_is_not_cached_is_refused_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="not in the local hub cache"):
        resolve_base_model("hf://nobody/nothing@main", tmp_path)


def test_hub_snapshot_is_pinned_to_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--finemill--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(BUILTIN_MODELS[BUILTIN], repository / "snapshots" / commit)
    base = resolve_base_model("hf://finemill/tiny", tmp_path)
    assert (base.id, base.revision) == (f"hf://finemill/tiny@{commit}", commit)


def test_large_files_of_the_hub_cache_are_not_read_again(tmp_path: Path) -> None:
    repository = tmp_path / "models--finemill--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(BUILTIN_MODELS[BUILTIN], snapshot)
    weights = snapshot / "model.safetensors"
    blob = repository / "blobs" / sha256_file(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    digest = resolve_base_model("hf://finemill/tiny@" + "0" * 40, tmp_path).digest
    assert digest == resolve_base_model(BUILTIN).digest


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_only_an_artifact_of_kind_model_is_a_base(kind: str, folder_store: str) -> None:
    uri = f"{folder_store}/merge/0"
    staging = staging_folder(uri)
    shutil.copytree(BUILTIN_MODELS[BUILTIN], staging, dirs_exist_ok=True)
    manifest = publish_artifact(staging, uri, new_manifest(kind, staging, Producer(step="s", version="0", code="c")))
    reference = str(Reference(uri, manifest.digest))
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
