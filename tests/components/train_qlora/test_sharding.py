"""Shards train what one process trains, over gloo on a CPU, and leave the same files."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.step import run as train_qlora
from finemill.runtime.context import Unheard
from finemill.training.strategy import WHOLE_MODEL
from tests.contexts import training_context
from tests.two_processes import free_port, run_in_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs over gloo on a CPU"),
]
DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="no DeepSpeed")
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_steps": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {"lora_r": 4},
    "full": {"method": "full", "eval_steps": 1},
}


def batches(strategy: str, *, together: bool) -> dict[str, int]:
    """Four rows per step: FSDP2 has two passes of a step in each process, the others one."""
    size = 1 if strategy == "fsdp2" else 2
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": (2 if together else 4) // size}


def train(base_model: Path, dataset: Path, folder: Path, output: str, values: dict[str, Any]) -> None:
    config = TrainQLoRAConfig(**SETTINGS | values)
    train_qlora(
        base_model=base_model,
        dataset=dataset,
        output_dir=folder / output,
        config=config,
        context=training_context(folder.as_uri(), Unheard()),
    )


def train_as(rank: int, port: int, strategy: str, base_model: Path, dataset: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for name, method in METHODS.items():
        values = method | batches(strategy, together=True) | {"strategy": strategy}
        if (strategy, name) == ("fsdp2", "full"):
            # Weights are whole in the second pass, and after an evaluation where a checkpoint is written.
            values |= {"strategy_config": WHOLE_MODEL}
        elif strategy == "fsdp2":
            values |= {"gradient_checkpointing": True}
        train(base_model, dataset, folder / name, f"shared-{rank}", values)
        unset_hf_deepspeed_config()  # else the next base would be loaded in pieces
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "strategy",
    ["fsdp2", *(pytest.param(name, marks=DEEPSPEED) for name in ("zero2", "zero3"))],
)
def test_shards_equal_one_process_and_it_continues_their_checkpoint(
    strategy: str, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    run_in_two(train_as, free_port(), strategy, base_model, dataset, tmp_path)
    for name, method in METHODS.items():
        folder = tmp_path / name
        # From the checkpoint of step 1 to the end, with twice the accumulation and without shards.
        continued = method | batches(strategy, together=True) | {"resume": "must"}
        train(base_model, dataset, folder, "continued", continued)
        train(base_model, dataset, folder, "alone", method | batches(strategy, together=False) | {"resume": "never"})
        expected = load_file(folder / "alone" / "adapter_model.safetensors")
        for output in ("shared-0", "continued"):
            found = load_file(folder / output / "adapter_model.safetensors")
            assert found.keys() == expected.keys()
            for weight, values in expected.items():
                torch.testing.assert_close(found[weight], values, rtol=0, atol=1e-5, msg=f"{output} {name} {weight}")
        launch = yaml.safe_load((folder / "shared-0" / "accelerate_config.yaml").read_text())
        assert launch["distributed_type"] == {"fsdp2": "FSDP"}.get(strategy, "DEEPSPEED")
