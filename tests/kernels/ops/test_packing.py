"""Batches become sequences, sequences become token-budget batches, and no token or label is lost on the way."""

import pytest
import torch

from finemill.artifacts import dataset
from finemill.kernels.ops.packing import (
    IGNORE_INDEX,
    length_classes,
    pack_budget,
    pack_rows,
    pack_sequences,
    round_count,
    shift_labels,
    split_rows,
)


def sequence(length: int, first: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(first, first + length)
    labels = ids.clone()
    labels[: length // 2] = IGNORE_INDEX
    return ids, labels


def test_what_is_not_learned_has_the_label_that_the_dataset_gives_it() -> None:
    assert IGNORE_INDEX == dataset.IGNORE_INDEX


def test_labels_shift_to_the_token_that_predicts_them() -> None:
    shifted = shift_labels(torch.tensor([[5, 6, 7], [8, IGNORE_INDEX, 9]]))
    assert shifted.tolist() == [[6, 7, IGNORE_INDEX], [IGNORE_INDEX, 9, IGNORE_INDEX]]


def test_no_label_crosses_from_one_packed_sequence_into_the_next() -> None:
    batch = pack_sequences([sequence(4), sequence(2, first=50), sequence(3, first=70)])
    assert batch.labels[[3, 5, 8]].tolist() == [IGNORE_INDEX] * 3
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert batch.sequences.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert batch.sequences.max_length == 4
    assert batch.loss_rows is not None
    assert batch.loss_rows.tolist() == torch.nonzero(batch.labels != IGNORE_INDEX).flatten().tolist()


def test_padding_is_cut_off() -> None:
    ids = torch.tensor([[1, 2, 3, 0], [0, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    batch = pack_rows(ids, ids, mask)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.sequences.cu_seqlens.tolist() == [0, 3, 6]


def test_restarting_positions_separate_packed_sequences() -> None:
    ids = torch.arange(10, 16)[None]
    batch = pack_rows(ids, ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 0]]))
    assert batch.sequences.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert [pair[0].tolist() for pair in split_rows(ids, ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]))] == [
        [10, 11, 12, 13],
        [14, 15],
    ]


def test_full_rows_equal_the_same_rows_packed_one_by_one() -> None:
    ids = torch.arange(1, 769).reshape(3, 256)
    whole, packed = pack_rows(ids, ids), pack_sequences([(row, row) for row in ids])
    for name in ("input_ids", "position_ids", "labels", "loss_rows"):
        assert torch.equal(getattr(whole, name), getattr(packed, name)), name
    assert torch.equal(whole.sequences.cu_seqlens, packed.sequences.cu_seqlens)
    assert whole.sequences.uniform == packed.sequences.uniform == (3, 256)


def test_budget_batches_hold_every_sequence_once_within_the_budget() -> None:
    rows = [sequence(length, first=100 * i) for i, length in enumerate((5, 9, 3, 7, 2, 20, 4, 1), start=1)]
    batches = pack_budget(rows, budget=12)
    assert sorted(b.num_tokens for b in batches)[-1] == 20  # longer than the budget: alone
    assert all(b.num_tokens <= 12 for b in batches if b.sequences.count > 1)
    tokens = torch.cat([b.input_ids for b in batches]).sort().values
    assert torch.equal(tokens, torch.cat([ids for ids, _ in rows]).sort().values)
    assert sum(b.num_labels for b in batches) == pack_sequences(rows).num_labels
    again = pack_budget(rows, budget=12)
    assert all(torch.equal(left.input_ids, right.input_ids) for left, right in zip(batches, again, strict=True))


def test_sequences_fall_into_classes_by_length() -> None:
    assert length_classes([1400, 1100, 1024, 600, 256, 3]) == ((0, 2, 1536), (2, 4, 1024), (4, 6, 256))
    assert length_classes([16500, 9000]) == ((0, 1, 24576), (1, 2, 12288))
    assert length_classes([300, 0]) == ((0, 1, 384), (1, 2, 128))
    assert length_classes([7]) == ((0, 1, 128),)
    assert length_classes([]) == ()


def test_a_class_takes_the_shorter_sequences_before_a_longer_one() -> None:
    assert length_classes([3, 1500, 200, 900, 5]) == ((0, 2, 1536), (2, 4, 1024), (4, 5, 128))


def test_counts_are_rounded_to_a_power_of_two_or_three_quarters_of_one() -> None:
    assert [round_count(n) for n in (1, 2, 3, 4, 5, 7, 9, 25, 97)] == [1, 2, 3, 4, 6, 8, 12, 32, 128]


@pytest.mark.parametrize("count", [1, 3])
def test_sequences_of_one_length_are_full_rows_only_if_it_is_round(count: int) -> None:
    assert pack_sequences([sequence(512)] * count).sequences.uniform == (count, 512)
    other = pack_sequences([sequence(111)] * count).sequences
    assert other.uniform is None
    assert other.classes == ((0, count, 128),)


def test_batches_are_as_full_as_the_sequences_allow_and_like_lengths_meet() -> None:
    def packed(lengths: list[int], budget: int) -> list[list[int]]:
        return [b.sequences.lengths().tolist() for b in pack_budget([sequence(n) for n in lengths], budget)]

    # First-fit decreasing begins with 7 + 5 and needs a third batch.
    assert packed([7, 5, 5, 4, 4, 4, 1], 15) == [[7, 4, 4], [5, 5, 4, 1]]
    assert packed([9, 8, 2, 1, 1], 10) == [[9, 1], [8, 2], [1]]
    assert packed([6, 6, 6], 12) == [[6, 6], [6]]


def test_rows_that_were_packed_to_a_length_leave_no_batch_over() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cuts = [torch.randint(40, 500, (4,), generator=generator).tolist() for _ in range(8)]
        sequences = [sequence(n) for row in cuts for n in (*row, 2048 - sum(row))]
        assert len(pack_budget(sequences, 4096)) == 4


def test_the_parts_of_a_batch_cover_its_sequences() -> None:
    (batch,) = pack_budget([sequence(length) for length in (3, 300, 9, 600)], budget=2000)
    assert [part.cu_seqlens.tolist() for part in batch.sequences.parts()] == [[0, 600], [600, 900], [900, 909, 912]]
    assert [part.max_length for part in batch.sequences.parts()] == [768, 384, 128]
    whole = pack_rows(torch.ones(2, 4), torch.ones(2, 4)).sequences
    assert whole.parts() == [whole]
