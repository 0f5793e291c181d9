"""Preferences trained in shards are what one process trains, over gloo on a CPU."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_dpo.step import run as train_dpo
from finemill.runtime.context import Unheard
from tests.contexts import training_context
from tests.two_processes import free_port, run_in_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs over gloo on a CPU"),
]
DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="no DeepSpeed")
SETTINGS: dict[str, Any] = {
    "lora_r": 4,
    "max_steps": 2,
    "warmup_steps": 0.0,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_steps": None,
    # Before anything is cut: the main process keeps what all compute.
    "precompute_ref_log_probs": True,
}


def train(base_model: Path, preferences: Path, folder: Path, **values: Any) -> None:
    train_dpo(
        base_model=base_model,
        dataset=preferences,
        output_dir=folder,
        config=TrainDPOConfig(**SETTINGS | values),
        context=training_context(folder.as_uri(), Unheard(), step="train-dpo"),
    )


def train_as(rank: int, port: int, strategy: str, base_model: Path, preferences: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    settings = {"strategy": strategy, "offload": strategy == "fsdp2", "gradient_accumulation_steps": 1}
    train(base_model, preferences, folder / f"shared-{rank}", **settings)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "strategy",
    ["fsdp2", *(pytest.param(name, marks=DEEPSPEED) for name in ("zero2", "zero3"))],
)
def test_shards_equal_one_process_with_reference_computed_before(
    strategy: str, tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    run_in_two(train_as, free_port(), strategy, tiny_model_dir, preferences, tmp_path)
    train(tiny_model_dir, preferences, tmp_path / "alone", gradient_accumulation_steps=2)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "shared-0"))
    assert found.keys() == expected.keys()
    for weight, values in expected.items():
        torch.testing.assert_close(found[weight], values, rtol=0, atol=1e-5, msg=weight)
