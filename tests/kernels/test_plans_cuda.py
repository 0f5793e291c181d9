"""On a GPU: wherever tensors wait and weights come from, the gradient has the same bits."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from finemill.commands.estimate import workload
from finemill.kernels.bench import data as bench_data
from finemill.kernels.engine.graphs import GraphRunner
from finemill.kernels.engine.load import LoraSettings, load_model
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.nf4_quantize import quantize_nf4
from finemill.kernels.engine.plan import Level, Plan
from finemill.kernels.engine.shapes import Buckets, Shapes
from finemill.kernels.engine.weight_shards import WeightShards
from finemill.kernels.ops.nf4 import dequantize_nf4
from finemill.kernels.ops.packing import PackedBatch, pack_rows, pack_sequences
from tests.two_processes import free_port

pytestmark = pytest.mark.gpu
LAYERS = 4


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastModel:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path,))
    return make_model(LoraSettings(16, 16.0))


def make_model(lora: LoraSettings, gpu: int = 0) -> FastModel:
    device = torch.device("cuda", gpu)
    model, parameters = load_model(bench_data.ensure_checkpoint("qwen3-0.6b", LAYERS, device), device=device, lora=lora)
    bench_data.start_adapters(parameters)
    return model


def batches(gpu: int = 0) -> dict[str, PackedBatch]:
    ids = torch.randint(0, 150000, (4, 300), generator=torch.Generator().manual_seed(0))
    ragged = pack_sequences([(ids[0, :length], ids[1, :length]) for length in (300, 40, 7, 211, 1, 128)])
    device = torch.device("cuda", gpu)
    return {"uniform": pack_rows(ids, ids).to(device), "ragged": ragged.to(device)}


def gradient(model: FastModel, engine: FastModel | GraphRunner, batch: PackedBatch) -> torch.Tensor:
    model.adapters.grad.zero_()
    engine.loss_and_grad(batch, 1e-3)
    torch.cuda.synchronize()
    return model.adapters.grad.clone()


def parked(level: Level, host: Level) -> Plan:
    sizes = workload("qwen3-0.6b", rank=16, quantized=True, rows=4, row=300).host_bytes_per_token()
    hosts = (host,) * (LAYERS - 2) + (None, None)
    return Plan((level,) * LAYERS, hosts, 0, 1024, {key: 2 * size for key, size in sizes.items()})


@pytest.mark.parametrize("kind", ["uniform", "ragged"])
def test_levels_host_memory_kept_and_streamed_weights_and_graphs_change_no_bit(kind: str, model: FastModel) -> None:
    batch = batches()[kind]
    model.apply_plan(Plan.everything(LAYERS))
    expected = gradient(model, model, batch)
    assert expected.isfinite().all()
    plans = [
        Plan.everything(LAYERS, cached=True),
        Plan((Level.INPUT,) * LAYERS, (None,) * LAYERS, 0, 1024),
        parked(Level.INPUT, Level.INPUT),
        Plan((Level.ATTENDED,) * LAYERS, (None,) * LAYERS, 0, 1024),
        parked(Level.ATTENDED, Level.ATTENDED),
        parked(Level.ATTENTION, Level.ATTENTION),
        parked(Level.GATE_UP, Level.ATTENTION),
        replace(parked(Level.GATE_UP, Level.GATE_UP), in_flight=2),
        replace(parked(Level.ALL, Level.GATE_UP), host_levels=(Level.GATE_UP, Level.INPUT, None, None), in_flight=2),
        replace(parked(Level.GATE_UP, Level.ATTENTION), stream_weights=True),
        replace(parked(Level.GATE_UP, Level.ATTENTION), stream_weights=True, resident_layers=1),
    ]
    for plan in plans:
        model.apply_plan(plan)
        assert torch.equal(gradient(model, model, batch), expected), plan
    runner = GraphRunner(model)
    prepared = Shapes(Buckets(1, 1)).prepare(batch)
    for _ in range(2):
        assert torch.equal(gradient(model, runner, prepared), expected)
    assert runner.num_graphs == 1


@pytest.mark.parametrize("level", [Level.INPUT, Level.ATTENTION])
def test_a_second_half_in_tiles_gives_the_gradient_of_the_whole(level: Level, model: FastModel) -> None:
    batch = batches()["ragged"]
    model.apply_plan(Plan.everything(LAYERS))
    expected = gradient(model, model, batch)
    model.apply_plan(Plan((level,) * LAYERS, (None,) * LAYERS, 0, 1024, mlp_tile=256))
    assert (gradient(model, model, batch) - expected).norm() < 0.01 * expected.norm()


def test_packed_sequences_give_the_gradient_of_each_alone(model: FastModel) -> None:
    model.apply_plan(Plan.everything(LAYERS))
    ids = torch.randint(0, 150000, (400,), generator=torch.Generator().manual_seed(1))
    sequences = [(part, part) for part in ids.split([150, 1, 249])]
    device = torch.device("cuda", 0)
    packed = gradient(model, model, pack_sequences(sequences).to(device))
    alone = torch.stack([gradient(model, model, pack_sequences([one]).to(device)).double() for one in sequences]).sum(0)
    assert (packed.double() - alone).norm() < 0.01 * alone.norm()


def test_dropout_repeats_with_its_seed_and_changes_with_another(model: FastModel) -> None:
    model = make_model(LoraSettings(16, 16.0, dropout=0.1))
    model.apply_plan(Plan.everything(LAYERS))
    batch = batches()["uniform"]
    first, again = (gradient(model, model, batch) for _ in range(2))
    assert torch.equal(first, again)
    assert model.dropout_seed is not None
    model.dropout_seed += 1
    assert not torch.equal(gradient(model, model, batch), first)


@pytest.mark.parametrize("shape", [(1024, 1024), (129, 320)])
def test_quantization_is_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = 0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    ours = quantize_nf4(weight)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(dequantize_nf4(ours), functional.dequantize_4bit(packed, state))


def divide(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("cuda:nccl,cpu:gloo")
    bench_data.FOLDERS = (folder, folder)
    model = make_model(LoraSettings(16, 16.0), rank)
    batch = Shapes(Buckets(1, 1)).prepare(batches(rank)["ragged"])
    expected = gradient(model, model, batch)
    model.stream_weights(WeightShards.of_host())
    runner = GraphRunner(model)
    for _ in range(2 + rank):  # one of them once more, alone
        assert torch.equal(gradient(model, model, batch), expected)
        assert torch.equal(gradient(model, runner, batch), expected)
    torch.distributed.barrier(device_ids=[rank])
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_divided_among_gpus_change_no_bit_eagerly_or_in_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path,))
    bench_data.ensure_checkpoint("qwen3-0.6b", LAYERS, torch.device("cuda", 0))
    spawn(divide, args=(free_port(), tmp_path), nprocs=2)
