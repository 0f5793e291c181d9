"""A graph gives the bits of the eager pass, whatever ran between its replays."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from finemill.kernels.bench import data as bench_data
from finemill.kernels.engine.graphs import GraphRunner
from finemill.kernels.engine.load import load_model
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.plan import Plan
from finemill.kernels.engine.shapes import Buckets, Shapes
from finemill.kernels.ops.packing import PackedBatch, pack_rows


def test_a_shape_runs_eagerly_until_it_has_come_often_enough(
    ragged: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    ran = []
    model = SimpleNamespace(device=torch.device("cpu"), loss_and_grad=lambda batch, scale: ran.append((batch, scale)))
    runner = GraphRunner(cast(FastModel, model), patience=2)
    for _ in range(2):
        runner.loss_and_grad(ragged, 0.5)
    assert [(batch.num_tokens, scale.tolist()) for batch, scale in ran] == [(22, [0.5]), (22, [0.5])]
    assert runner.num_graphs == 0


def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastModel:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path,))
    device = torch.device("cuda", 0)
    model, parameters = load_model(bench_data.ensure_checkpoint("qwen3-tiny", 0, device), device=device)
    bench_data.start_adapters(parameters)
    model.apply_plan(Plan.everything(2))
    return model


def gradient(
    model: FastModel, engine: FastModel | GraphRunner, batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    model.adapters.grad.zero_()
    loss = engine.loss_and_grad(batch, 0.1).loss.clone()
    return loss, model.adapters.grad.clone()


@pytest.mark.gpu
def test_a_graph_gives_bitwise_the_eager_gradient(
    ragged: PackedBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tmp_path, monkeypatch)
    runner, shapes = GraphRunner(model), Shapes(Buckets(16, 8))
    batch = shapes.prepare(ragged).to(model.device)

    eager = gradient(model, model, batch)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradient(model, runner, batch), eager, strict=True))
    assert runner.num_graphs == 1
    # A longer row replaces the rotary tables, not those of the graph.
    row = torch.randint(1, 50, (1, 2500))
    runner.loss_and_grad(shapes.prepare(pack_rows(row, row)).to(model.device), 0.1)
    assert runner.num_graphs == 2
    torch.cuda.empty_cache()
    assert all(torch.equal(a, b) for a, b in zip(gradient(model, runner, batch), eager, strict=True))


@pytest.mark.gpu
def test_a_shape_is_captured_once_it_has_come_often_enough(
    ragged: PackedBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tmp_path, monkeypatch)
    runner = GraphRunner(model, patience=2)
    batch = Shapes(Buckets(16, 8)).prepare(ragged).to(model.device)
    gradients = [gradient(model, runner, batch) for _ in range(4)]
    assert runner.num_graphs == 1
    assert all(torch.equal(a, b) for later in gradients[1:] for a, b in zip(later, gradients[0], strict=True))
