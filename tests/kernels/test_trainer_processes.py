"""Two processes of FastSFTTrainer take the steps of one with twice the accumulation, and those with a divided base."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from finemill.kernels.accelerate import restore_model
from finemill.kernels.engine.weight_shards import WeightShards
from finemill.kernels.streamed import load_streamed, weight_stream_of
from finemill.kernels.trainer import FastSFTTrainer
from tests.kernels.test_streamed import SIZES
from tests.kernels.test_trainer import adapters, train
from tests.two_processes import free_port, run_in_two

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs over gloo on a CPU"),
]


def train_as(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    got, trainer = train(FastSFTTrainer, folder / str(rank), gradient_accumulation_steps=1)
    assert trainer.fast, trainer.acceleration.reason
    torch.save({"history": got, "adapters": adapters(trainer)}, folder / f"{rank}.pt")
    for name, shards in {"whole": None, "divided": WeightShards.of_host()}.items():
        base = load_streamed(
            folder / "base", device=torch.device("cpu"), dtype=torch.float32, resident=not shards, shards=shards
        )
        got, trainer = train(FastSFTTrainer, folder / name, model=base, gradient_accumulation_steps=1)
        assert trainer.fast, trainer.acceleration.reason
        assert trainer._engine.shards == (2 if shards else 1)
        torch.save(got, folder / name / f"{rank}.pt")
        trainer.save_model(folder / name)
        if shards and rank == 0:  # no other process takes part
            restore_model(trainer.model)
            assert weight_stream_of(trainer.model.get_base_model()) is None
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    config = Qwen3Config(**SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    run_in_two(train_as, free_port(), tmp_path)
    expected, trainer = train(FastSFTTrainer, tmp_path / "alone", gradient_accumulation_steps=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in adapters(trainer).items():
            torch.testing.assert_close(found["adapters"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    logged = torch.load(tmp_path / "0.pt", weights_only=True)["history"]
    torch.testing.assert_close(logged, expected, rtol=1e-4, atol=1e-5)
    logged, expected = (torch.load(tmp_path / name / "0.pt", weights_only=True) for name in ("divided", "whole"))
    assert torch.equal(logged, expected)
    divided, whole = (tmp_path / name / "adapter_model.safetensors" for name in ("divided", "whole"))
    assert divided.read_bytes() == whole.read_bytes()
