"""A model opened without its weights computes what the loaded one does, and says what is wrong with its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finemill.errors import UserError
from finemill.models.causal_lm import load_causal_lm
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import streamed

IDS = torch.tensor([[5, 17, 200, 333, 1000, 42, 7], [5, 17, 200, 333, 1000, 42, 8]])


@torch.inference_mode()
def test_layer_by_layer_is_the_same_to_the_bit(tiny_model_dir: Path) -> None:
    stored = StoredModel(tiny_model_dir)
    with streamed(stored.model, stored, torch.device("cpu")):
        found = stored.model(input_ids=IDS).logits
    loaded = load_causal_lm(tiny_model_dir, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(found, loaded(input_ids=IDS).logits)
    # Nothing stays in memory, and nothing is left that would be computed with by mistake.
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in stored.model.parameters())


def test_experts_are_read_as_one_parameter_and_written_as_they_were(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    stored = StoredModel(tmp_path)
    group = stored.group_of["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(group.keys) == 6
    values = {name: stored.read(name) for name in group.names}
    for name, value in values.items():
        assert torch.equal(value, model.state_dict()[name])
    for key, tensor in stored.restore(group, values).items():
        assert torch.equal(tensor, stored.read_stored(key))


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            r"lacks 1 of the 68 weights .*norm\.weight",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}),
            r"model\.norm\.weight has shape \[8\], config\.json means \[256\]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(256, dtype=torch.int8)}),
            r"model\.norm\.weight has type I8",
        ),
    ],
)
def test_weights_that_are_not_the_model_s_are_named(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        StoredModel(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9, "layer_types": None}, "says 1000000000 layers, the weights beside it have 6"),
        ({"model_type": "no_such_model"}, "not a model that transformers can build"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"num_attention_heads": 0}, r"config\.json"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(
    folder: Path, values: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(UserError, match=message) as error:
        StoredModel(folder)
    assert "\n" not in str(error.value)
