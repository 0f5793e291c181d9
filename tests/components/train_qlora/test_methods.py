"""Each method learns, and the merged model is the one that was trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finemill.artifacts.adapter import read_training
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.step import run as merge
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.rows import load_rows
from finemill.components.train_qlora.step import run as train_qlora
from finemill.errors import UserError
from finemill.runtime.context import StepContext
from finemill.training.inputs import open_inputs

SETTINGS: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 4e-3,
    "warmup_steps": 0.0,
    "lr_scheduler_type": "constant",
    "eval_steps": 4,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_steps": None,
}
FULL = {"method": "full", "lora_r": 16, "lora_alpha": 32, "learning_rate": 5e-4}
TABLES: dict[str, Any] = {"modules_to_save": ("embed_tokens", "lm_head"), "embedding_learning_rate": 5e-4}
# Settings, how near the merged model's loss is to that of training: 4 and 8 bits are not in what is merged into.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "16 bits": ({"load_in_4bit": False}, 1e-4),
    "8 bits": ({"load_in_8bit": True}, 0.03),
    "4 bits": ({}, 0.1),
    "attention": ({"load_in_4bit": False, "target_modules": "attention"}, 1e-4),
    "mlp": ({"load_in_4bit": False, "target_modules": "mlp"}, 1e-4),
    "rsLoRA": ({"load_in_4bit": False, "use_rslora": True}, 1e-4),
    "DoRA": ({"load_in_4bit": False, "use_dora": True}, 1e-4),
    "LoRA+": ({"load_in_4bit": False, "loraplus_lr_ratio": 4.0}, 1e-4),
    "LoftQ": ({"init_lora_weights": "loftq"}, 0.1),
    "NEFTune": ({"load_in_4bit": False, "neftune_noise_alpha": 5.0}, 1e-4),
    "whole modules": ({"load_in_4bit": False, **TABLES}, 1e-4),
    "embedding alone": ({"load_in_4bit": False, "modules_to_save": ("embed_tokens",)}, 1e-4),
    "full": (FULL, 1e-4),
    "YaRN": ({"load_in_4bit": False, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 1e-4),
}
MakeContext = Callable[[], StepContext]


def validation_loss(model: Any, dataset: Path) -> float:
    """Mean loss per label, of one row after another."""
    total = count = 0.0
    with torch.no_grad():
        for row in load_rows(dataset, "validation", 2048):
            labels = torch.tensor([row["labels"]])
            number = int((labels[:, 1:] != -100).sum())
            total += number * model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
            count += number
    return total / count


@pytest.fixture(scope="module")
def loss_before(base_model: Path, dataset: Path) -> float:
    """Of the base."""
    return validation_loss(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), dataset)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_merges_into_what_it_learned(
    name: str, loss_before: float, make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    settings, tolerance = METHODS[name]
    config = TrainQLoRAConfig(**SETTINGS | settings)
    context = make_context()
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    train_qlora(base_model=base_model, dataset=dataset, output_dir=adapter, config=config, context=context)
    training = read_training(adapter)
    assert training is not None
    ((_, learned),) = training.validation_losses
    assert learned < loss_before - 0.1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), adapter)
    context = replace(context, references={**context.references, "adapter": "adapter"})
    merge(
        base_model=base_model,
        adapter=adapter,
        output_dir=merged,
        config=MergeConfig(dtype="float32"),
        context=context,
    )
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert validation_loss(model, dataset) == pytest.approx(learned, abs=tolerance)


def test_loftq_begins_nearer_to_the_base_than_its_4_bits_are(
    loss_before: float, make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """With no learning to speak of, the merged adapter changes nothing, nor in layers narrower than its rank."""
    settings = {"init_lora_weights": "loftq", "learning_rate": 1e-12, "max_steps": 1, "lora_r": 160}
    config = TrainQLoRAConfig(**SETTINGS | settings | {"eval_steps": 1})
    train_qlora(base_model=base_model, dataset=dataset, output_dir=tmp_path, config=config, context=make_context())
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    assert validation_loss(tuned, dataset) == pytest.approx(loss_before, abs=1e-4)
    plain = config.model_copy(update={"init_lora_weights": "default"})
    train_qlora(
        base_model=base_model, dataset=dataset, output_dir=tmp_path / "plain", config=plain, context=make_context()
    )
    losses = [read_training(folder).validation_losses[0][1] for folder in (tmp_path, tmp_path / "plain")]  # type: ignore[union-attr]
    assert abs(losses[0] - loss_before) < abs(losses[1] - loss_before)


def test_a_full_training_is_resumed_bit_for_bit(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    config = TrainQLoRAConfig(**SETTINGS | FULL | {"max_steps": 3, "save_steps": 2, "eval_steps": None})
    weights = []
    for name in ("whole", "resumed"):
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / name, config=config, context=make_context()
        )
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dora_on_8_bits_needs_a_gpu(base_model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemill.training.inputs.choose_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match="use_dora on 8 bits needs a GPU"):
        open_inputs(base_model, dataset, TrainQLoRAConfig(use_dora=True, load_in_8bit=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ("lm_haed",)}, "'lm_haed' is no module of the base model; there are embed_tokens, .*lm_h"),
        ({"modules_to_save": ("mlp",)}, "'mlp' holds no weights itself"),
        ({"modules_to_save": ("q_proj",), "target_modules": ("q_proj",)}, "in target_modules and in modules_to_save"),
        ({"modules_to_save": ("q_proj",)}, "'q_proj' is a linear layer, which the base has in 4 bits: give it an adap"),
    ],
)
def test_a_module_that_cannot_be_trained_is_named(
    settings: dict[str, Any], message: str, make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    config = TrainQLoRAConfig(**SETTINGS | settings)
    with pytest.raises(UserError, match=message):
        train_qlora(base_model=base_model, dataset=dataset, output_dir=tmp_path, config=config, context=make_context())
