"""Two processes of FastSFTTrainer take the steps that one takes with twice the accumulation."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from finemill.kernels.trainer import FastSFTTrainer
from tests.kernels.test_trainer import adapters, train

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs over gloo on a CPU"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_as(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    got, trainer = train(FastSFTTrainer, folder / str(rank), gradient_accumulation_steps=1)
    assert trainer.fast, trainer.acceleration.reason
    torch.save({"history": got, "adapters": adapters(trainer)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    spawn(train_as, args=(free_port(), tmp_path), nprocs=2)
    expected, trainer = train(FastSFTTrainer, tmp_path / "alone", gradient_accumulation_steps=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in adapters(trainer).items():
            torch.testing.assert_close(found["adapters"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    logged = torch.load(tmp_path / "0.pt", weights_only=True)["history"]
    torch.testing.assert_close(logged, expected, rtol=1e-4, atol=1e-5)
