"""Folders of safetensors files: complete, or one line that says what is missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finemill.errors import UserError
from finemill.models.weights import stored_tensors


def sharded(folder: Path) -> Path:
    """Two files and their index."""
    save_file({"a": torch.ones(2, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_types_and_shapes_come_from_the_headers(tmp_path: Path) -> None:
    found = stored_tensors(sharded(tmp_path))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }


def test_a_file_that_the_index_does_not_name_does_not_count(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, sharded(tmp_path) / "consolidated.safetensors")
    assert stored_tensors(tmp_path)["a"].shape == (2, 3)


def test_beside_a_single_file_nothing_counts_as_in_transformers(tmp_path: Path) -> None:
    for name in ("consolidated", "adapter_model"):
        save_file({name: torch.ones(9)}, sharded(tmp_path) / f"{name}.safetensors")
    save_file({"a": torch.ones(5)}, tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored_tensors(tmp_path).items()} == {"a": (5,)}


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors file in"):
        stored_tensors(tmp_path)
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", shard)
    with pytest.raises(UserError, match=r"tensor b is not in .*model-00002.* \(1 of 2 are missing\)"):
        stored_tensors(tmp_path)
    shard.write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is damaged"):
        stored_tensors(tmp_path)
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4\n")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is Git LFS's note .*: run git lfs pull"):
        stored_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing in .* \(1 of 2 files"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is no index"):
        stored_tensors(tmp_path)
