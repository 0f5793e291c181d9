"""Adapters that must not pass for something else: every tensor has a place, and no file runs code."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from finemill.artifacts.adapter import TrainingRecord, write_training
from finemill.errors import UserError
from finemill.models.adapter import check_base, load_adapter
from finemill.models.base.resolve import ResolvedBase, resolve_base_model
from finemill.models.causal_lm import load_causal_lm


@pytest.fixture
def base(tiny_model_dir: Path) -> Any:
    return load_causal_lm(tiny_model_dir, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def adapter(tiny_adapter_dir: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be spoilt."""
    return Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {new: tensor for key, tensor in tensors.items() if (new := change(key))}
    save_file(kept, folder / "adapter_model.safetensors")


def configure(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key.replace("model.layers", "model.language_model.layers"), r"^0 of 84 tensors .* fit the base"),
        (lambda key: key.removeprefix("base_model.model."), r"^0 of 84 tensors"),
        (lambda key: key.replace(".layers.", ".blocks.") if ".0." in key else key, r"^70 of 84 tensors .* not in the"),
        (lambda key: key if "layers.0" in key else None, r"^14 of 14 .*layers\.1.* is not in the adapter"),
    ],
)
def test_an_adapter_that_fits_only_partly_is_refused(
    base: Any, adapter: Path, change: Callable[[str], str | None], message: str
) -> None:
    rename(adapter, change)
    with pytest.raises(UserError, match=message):
        load_adapter(base, adapter)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported; supported is LORA"),
        ({"r": "eight"}, "'r': Input should be a valid integer"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base before training"),
        ({"target_modules": ["no_such_layer"]}, "does not fit the base model: Target modules"),
        ({"rank_pattern": {"q_proj": 16}}, "does not fit the base model"),
        ({"modules_to_save": ["q_norm"]}, "does not fit the base model"),
        ({"rank_pattern": None}, "'rank_pattern': Input should be a valid dictionary"),
        ({"rank_pattern": {"q_proj": 4.0}}, "'rank_pattern.q_proj': Input should be a valid integer"),
        ({"lora_dropout": None}, "'lora_dropout': Input should be a valid number"),
        ({"lora_alpha": math.nan}, "'lora_alpha': Input should be a finite number"),
        ({"trainable_token_indices": [-1]}, "greater than or equal to 0"),
        ({"target_modules": "*q_proj"}, "does not fit the base model: nothing to repeat"),
        ({"megatron_config": {"size": 1}}, "does not fit the base model: No module named 'megatron'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(
    base: Any, adapter: Path, values: dict[str, object], message: str
) -> None:
    configure(adapter, **values)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(base, adapter)
    assert "\n" not in str(error.value)


def test_damaged_files_are_one_line(base: Any, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="is damaged"):
            load_adapter(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_adapter(base, adapter)


def test_weights_of_the_base_itself_are_not_taken_from_an_adapter(base: Any, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    weight = base.model.layers[0].self_attn.q_proj.weight
    save_file({**tensors, name: torch.zeros_like(weight)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds .*q_proj\.base_layer\.weight, a weight of the base itself"):
        load_adapter(base, adapter)


def test_shards_and_adapters_inside_the_folder_are_named(base: Any, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"found adapter_model-00001-of-00002\.safetensors .* one safetensors file"):
        load_adapter(base, adapter)
    (adapter / "first").mkdir()
    (adapter / "adapter_config.json").rename(adapter / "first" / "adapter_config.json")
    with pytest.raises(UserError, match=r"not found in .*, but in first inside it: pass one of those"):
        load_adapter(base, adapter)


def test_a_pickle_is_never_loaded(base: Any, adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only adapter_model\.bin, a pickle"):
        load_adapter(base, adapter)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((4, 4), float("nan")), "holds NaN or infinity"),
        (torch.ones(4, 4, dtype=torch.int8), "has type I8"),
        (torch.ones(0, 4), "not empty"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(
    base: Any, adapter: Path, value: torch.Tensor, message: str
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, next(iter(tensors)): value}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_adapter(base, adapter)


def test_kinds_of_lora_that_fit_are_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    configs = {
        "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        "ranks": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
        "norms": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["q_norm"]),
        "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]}),
    }
    for name, config in configs.items():
        model = load_causal_lm(tiny_model_dir, device=torch.device("cpu"))
        get_peft_model(model, config).save_pretrained(tmp_path / name, save_embedding_layers=False)
        base = load_causal_lm(tiny_model_dir, device=torch.device("cpu"))
        assert load_adapter(base, tmp_path / name).active_adapters == ["default"]


def given(base: Path, reference: str = "/models/given", revision: str | None = None) -> ResolvedBase:
    return dataclasses.replace(resolve_base_model(str(base)), id=reference, revision=revision)


def test_the_base_is_known_by_digest_wherever_it_lies(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_model_dir, tmp_path / "moved"))
    configure(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"names .*gone, which is not found here"):
        check_base(adapter, {}, given(moved))
    digest = resolve_base_model(str(tiny_model_dir)).digest
    write_training(adapter, TrainingRecord(max_steps=1, log_history=(), base_digest=digest))
    assert check_base(adapter, {}, given(moved)) == "same digest"
    record = TrainingRecord(max_steps=1, log_history=(), base_digest="0" * 64, unquantized_base_digest=digest)
    write_training(adapter, record)
    assert "the 4-bit base was made from" in check_base(adapter, {}, given(moved))


def test_another_base_is_refused(tiny_model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"trained on builtin:tiny-qwen3, .* given is .* \(another digest\)"):
        check_base(adapter, {"base_model": "builtin:tiny-qwen3"}, given(other))
    # The adapter's own configuration names the built-in model's folder.
    with pytest.raises(UserError, match="another digest"):
        check_base(adapter, {}, given(other))
    # The folder has the same name and another content than when the adapter was trained.
    write_training(adapter, TrainingRecord(max_steps=1, log_history=(), base_digest="0" * 64))
    with pytest.raises(UserError, match="another digest"):
        check_base(adapter, {"base_model": str(other)}, given(other, str(other)))


@pytest.mark.parametrize(
    ("name", "revision", "reference", "known_by"),
    [
        ("org/model", "a" * 40, f"hf://org/model@{'a' * 40}", "same commit"),
        ("org/model", None, f"hf://org/model@{'a' * 40}", "same repository; the adapter names no commit"),
        ("org/model", "b" * 40, f"hf://org/model@{'a' * 40}", None),
        ("org/other", "a" * 40, f"hf://org/model@{'a' * 40}", None),
        (None, None, "/models/given", None),
    ],
)
def test_models_of_the_hub_are_told_apart_by_name_and_commit(
    tiny_model_dir: Path, adapter: Path, name: str | None, revision: str | None, reference: str, known_by: str | None
) -> None:
    configure(adapter, base_model_name_or_path=name, revision=revision)
    base = given(tiny_model_dir, reference)
    if known_by:
        assert check_base(adapter, {}, base) == known_by
    else:
        with pytest.raises(UserError, match="was trained on"):
            check_base(adapter, {}, base)
