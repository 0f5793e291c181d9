"""A mixture of experts is trained on a CPU: every expert, in PEFT's layout, and routers only on request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finemill.artifacts.adapter import read_training
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.step import run as train_qlora
from finemill.runtime.context import StepContext

SETTINGS: dict[str, Any] = {
    "lora_r": 4,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3,
    "warmup_steps": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": None,
}
MakeContext = Callable[[], StepContext]


@pytest.mark.parametrize("settings", [{}, {"load_in_4bit": False, "train_router": True}], ids=["nf4", "routers"])
def test_every_expert_learns_and_the_adapter_opens_in_peft(
    settings: dict[str, Any], make_context: MakeContext, tiny_mixture_dir: Path, dataset: Path, tmp_path: Path
) -> None:
    config = TrainQLoRAConfig(**SETTINGS | settings)
    train_qlora(
        base_model=tiny_mixture_dir, dataset=dataset, output_dir=tmp_path, config=config, context=make_context()
    )
    training = read_training(tmp_path)
    assert training is not None
    losses = [entry["loss"] for entry in training.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, weight in weights.items():
        # B begins at zero, an expert's rank-4 part of it every fourth column.
        moved = weight.unflatten(1, (4, 4)).abs().amax((0, 1)) if "experts" in name and "lora_B" in name else weight
        assert moved.abs().min() > 0 or "lora_B" not in name, name
    base = AutoModelForCausalLM.from_pretrained(tiny_mixture_dir, dtype=torch.float32)
    routers = {name: router.clone() for name, router in base.state_dict().items() if ".gate." in name}
    tuned = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    state = tuned.state_dict()
    assert len(routers) == 2
    assert all(torch.equal(state[name], router) != config.train_router for name, router in routers.items())
    assert any("gate" in name for name in weights if "experts" not in name) == config.train_router


def test_all_experts_go_on_from_a_checkpoint_of_a_whole_model(
    make_context: MakeContext, tiny_mixture_dir: Path, dataset: Path, tmp_path: Path
) -> None:
    values = {name: value for name, value in SETTINGS.items() if name != "lora_r"} | {"save_steps": 2}
    config = TrainQLoRAConfig(**values, method="full")
    weights = []
    for name in ("whole", "resumed"):
        train_qlora(
            base_model=tiny_mixture_dir,
            dataset=dataset,
            output_dir=tmp_path / name,
            config=config,
            context=make_context(),
        )
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
