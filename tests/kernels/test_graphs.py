"""Padding a batch to a graph's shapes changes no gradient; a graph gives the bits of the eager pass."""

import pytest
import torch

from finemill.kernels.graphs import Buckets, GraphRunner, pad_batch
from finemill.kernels.packing import IGNORE_INDEX, pack_rows, pack_sequences


def ragged():
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for length in (7, 3, 12):
        ids = torch.randint(1, 50, (length,), generator=generator)
        pairs.append((ids, torch.where(torch.arange(length) < 2, IGNORE_INDEX, ids)))
    return pack_sequences(pairs)


def test_shapes_are_rounded_up_with_tokens_that_carry_no_label():
    batch, buckets = ragged(), Buckets(tokens=16, labels=12, sequences=4, length=8)
    padded = pad_batch(batch, buckets)
    assert padded.num_tokens == 32
    assert padded.sequences.count == 4
    assert padded.sequences.max_length == 16
    assert padded.loss_rows.numel() == 24
    assert padded.loss_rows.unique().numel() == 24
    labelled = padded.labels[padded.loss_rows]
    assert (labelled != IGNORE_INDEX).sum() == batch.num_labels
    assert torch.equal(padded.labels[:22], batch.labels)
    again = pad_batch(padded, buckets)
    assert again.num_tokens == 32
    assert torch.equal(again.loss_rows, padded.loss_rows)


def test_rows_of_equal_length_stay_as_they_are():
    ids = torch.arange(1, 25).view(4, 6)
    padded = pad_batch(pack_rows(ids, ids), Buckets(16, 4, 4, 8))
    assert padded.num_tokens == 24
    assert padded.sequences.uniform == (4, 6)
    assert padded.loss_rows.numel() == 20


@pytest.mark.gpu
def test_a_graph_gives_bitwise_the_eager_gradient(tmp_path, monkeypatch):
    from finemill.kernels import bench_data
    from finemill.kernels.load import load_model
    from finemill.kernels.planner import Plan

    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path,))
    device = torch.device("cuda", 0)
    model, parameters = load_model(bench_data.ensure_checkpoint("qwen3-tiny", 0, device), device=device)
    bench_data.start_adapters(parameters)
    model.apply_plan(Plan.everything(2))
    runner = GraphRunner(model, Buckets(16, 8, 4, 8))
    batch = pad_batch(ragged(), runner.buckets).to(device)

    def gradient(engine):
        model.adapters.grad.zero_()
        loss = engine.loss_and_grad(batch, 0.1).loss.clone()
        return loss, model.adapters.grad.clone()

    eager = gradient(model)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradient(runner), eager, strict=True))
    assert runner.num_graphs == 1
    # A longer row replaces the rotary tables, not those of the graph.
    row = torch.randint(1, 50, (1, 2500))
    runner.loss_and_grad(pad_batch(pack_rows(row, row), runner.buckets).to(device), 0.1)
    torch.cuda.empty_cache()
    assert all(torch.equal(a, b) for a, b in zip(gradient(runner), eager, strict=True))
