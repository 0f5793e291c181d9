"""What a training cannot begin with is refused before anything is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finemill.errors import UserError
from finemill.training.config import LoRATrainingConfig
from finemill.training.inputs import TrainingInputs, check_tokens, open_inputs

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("num_experts", "lost", "message"),
    [
        (8, None, "config.json says 8 experts, the weights beside it have 4"),
        (4, EXPERT, f"lacks 1 of the 8 experts' tensors of .*{EXPERT}"),
        (4, "model.layers.0.mlp.gate.weight", "lacks 1 of the 25 weights .*gate.weight for one"),
    ],
)
def test_a_mixture_with_other_experts_than_it_says_is_one_line(
    num_experts: int, lost: str | None, message: str, tiny_mixture_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_mixture_dir / "config.json").read_text()) | {"num_experts": num_experts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny_mixture_dir / "model.safetensors")
    tensors.pop(lost, None)  # type: ignore[arg-type]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_inputs(tmp_path, tmp_path, LoRATrainingConfig())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tie_word_embeddings": False}, r"lacks 1 of the \d+ weights of a Qwen3ForCausalLM, lm_head.weight for one"),
        ({"vocab_size": 2000}, r"embed_tokens.weight has shape \[1536, 256\], config.json means \[2000, 256\]"),
        ({"model_type": "qwen9"}, "is not a model that transformers can build: .* has model type `qwen9`"),
    ],
)
def test_a_base_whose_weights_are_not_those_of_its_config_is_one_line(
    changed: dict[str, Any], message: str, short_model_dir: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(short_model_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | changed
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        open_inputs(base, tmp_path, LoRATrainingConfig())
    assert "\n" not in str(error.value)


def test_tokens_of_another_base_are_refused_and_new_ones_are_not(short_model_dir: Path, tmp_path: Path) -> None:
    inputs = TrainingInputs(short_model_dir, tmp_path, object(), torch.device("cpu"), new_tokens=(1538,))
    check_tokens(inputs, 1538)
    with pytest.raises(UserError, match=r"has token 1539, and the base model in .* knows 1539 tokens: run chat-format"):
        check_tokens(inputs, 1539)
