"""Preferences train every expert of a mixture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from finemill.artifacts.adapter import read_training
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_dpo.step import run as train_dpo
from finemill.runtime.context import StepContext

SETTINGS: dict[str, Any] = {
    "lora_r": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3,
    "warmup_steps": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": None,
    "max_length": 64,
}


def test_every_expert_learns(
    make_context: Callable[[], StepContext], tiny_mixture_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    config = TrainDPOConfig(**SETTINGS)
    train_dpo(
        base_model=tiny_mixture_dir, dataset=preferences, output_dir=tmp_path, config=config, context=make_context()
    )
    training = read_training(tmp_path)
    assert training is not None
    losses = [entry["loss"] for entry in training.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    experts = {name: weight for name, weight in weights.items() if "experts" in name and "lora_B" in name}
    assert experts
    # B begins at zero, an expert's rank-4 part of it every fourth column.
    assert all(weight.unflatten(1, (4, 4)).abs().amax((0, 1)).min() > 0 for weight in experts.values())
