"""Rounding a batch's shapes up changes no gradient, and batches of like lengths get the same ones."""

import json

import pytest
import torch

from finemill.kernels.engine.shapes import Buckets, Shapes, pad_batch, shape_of
from finemill.kernels.ops.packing import IGNORE_INDEX, PackedBatch, Sequences, pack_rows, pack_sequences


def lengths_of(sequences: Sequences) -> list[int]:
    lengths: list[int] = sequences.lengths().tolist()
    return lengths


def test_shapes_are_rounded_up_with_tokens_that_carry_no_label(ragged: PackedBatch) -> None:
    batch, buckets = ragged, Buckets(tokens=16, labels=12)
    padded = pad_batch(batch, buckets)
    assert padded.num_tokens == 32
    assert lengths_of(padded.sequences) == [7, 3, 12, 10]
    assert padded.position_ids.tolist() == [*range(7), *range(3), *range(12), *range(10)]
    assert padded.loss_rows is not None
    assert padded.loss_rows.numel() == 24
    assert padded.loss_rows.unique().numel() == 24
    labelled = padded.labels[padded.loss_rows]
    assert (labelled != IGNORE_INDEX).sum() == batch.num_labels
    assert torch.equal(padded.labels[:22], batch.labels)
    again = pad_batch(padded, buckets)
    assert again.num_tokens == 32
    assert again.loss_rows is not None
    assert torch.equal(again.loss_rows, padded.loss_rows)


@pytest.mark.parametrize(("length", "dummies"), [(1, [128] * 7 + [127]), (512, [128] * 4), (1024, [])])
def test_tokens_that_fill_up_are_short_sequences(length: int, dummies: list[int]) -> None:
    row = torch.ones(length, dtype=torch.long)
    padded = pad_batch(pack_sequences([(row, row), (row[:0], row[:0])]), Buckets(1024, 16))
    assert lengths_of(padded.sequences) == [length, 0, *dummies]
    assert padded.position_ids.tolist() == [p for n in (length, *dummies) for p in range(n)]


def test_rows_of_equal_length_stay_as_they_are() -> None:
    ids = torch.arange(1, 25).view(4, 6)
    padded = pad_batch(pack_rows(ids, ids), Buckets(16, 4))
    assert padded.num_tokens == 24
    assert padded.sequences.uniform == (4, 6)
    assert padded.num_labels == 20


def batch_of(*lengths: int) -> PackedBatch:
    return pack_sequences([(torch.ones(n, dtype=torch.long),) * 2 for n in lengths])


def test_batches_of_like_lengths_get_one_shape() -> None:
    shapes = Shapes(Buckets(1024, 1024))
    first, second = (shapes.prepare(batch) for batch in (batch_of(700, 140, 100), batch_of(600, 200, 99)))
    assert first.sequences.classes == second.sequences.classes == ((0, 1, 768), (1, 4, 256))
    assert lengths_of(first.sequences) == [700, 140, 100, 84]
    assert shape_of(first) == shape_of(second)


def test_slots_go_on_after_a_checkpoint() -> None:
    before, after = Shapes(Buckets(1024, 1024)), Shapes(Buckets(1024, 1024))
    before.prepare(batch_of(700, 140, 100))
    after.restore(json.loads(json.dumps(before.state())))
    later = batch_of(500, 200, 99)
    alone = Shapes(Buckets(1024, 1024)).prepare(later)
    assert shape_of(after.prepare(later)) == shape_of(before.prepare(later)) != shape_of(alone)
    assert after.state() == before.state()


def test_rounding_stays_within_what_memory_was_planned_for() -> None:
    buckets = Buckets(1024, 1024, most=4500)
    assert [buckets.round_tokens(tokens) for tokens in (1, 1024, 4400, 4500, 4501)] == [1024, 1024, 4500, 4500, 5120]
    assert pad_batch(batch_of(3000, 1400), buckets).num_tokens == 4500
