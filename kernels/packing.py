"""Packed batches: several sequences one after another in one row of tokens, and the merging of rows into such batches.

A micro-batch of B rows and the gradient-accumulation micro-batches around it are one bag of sequences. The gradient of
a sum of token losses does not depend on how the bag is cut, so rows are packed into as few token-budget batches as
memory allows; attention sees the sequence boundaries, RoPE the positions inside each sequence, the loss head the
labelled tokens only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Sequences:
    """Where the sequences of a packed batch begin and end.

    Args:
        cu_seqlens: (n + 1,) int32, first token of each sequence, then T. Empty sequences are allowed.
        max_length: an upper bound on the longest sequence.
        uniform: (B, S) if the batch is B sequences of S tokens each, else None.
    """

    cu_seqlens: Tensor
    max_length: int
    uniform: tuple[int, int] | None = None
    padded: "Sequences | None" = field(default=None, repr=False)
    """The same with empty sequences appended, kept for kernels that are compiled for a rounded count."""
    _offsets: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _lengths: Tensor | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """Number of sequences, empty ones included."""
        return self.cu_seqlens.numel() - 1

    def lengths(self) -> Tensor:
        """(n,) int32 token counts."""
        if self._lengths is None:
            self._lengths = self.cu_seqlens.diff().contiguous()
        return self._lengths

    def offsets(self, pitch: int) -> Tensor:
        """(n + 1,) int32 element offsets of the sequences in a matrix whose rows are `pitch` elements apart."""
        if pitch not in self._offsets:
            self._offsets[pitch] = self.cu_seqlens * pitch
        return self._offsets[pitch]


@dataclass
class PackedBatch:
    """A batch of T tokens.

    Args:
        input_ids: (T,) int64.
        position_ids: (T,) int64, position inside the token's own sequence.
        labels: (T,) int64, already shifted: the token to predict after this one, or -100.
        sequences: boundaries of the sequences.
        loss_rows: (M,) int64 indices of the tokens with a label, in order; None means all T are scored.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    sequences: Sequences
    loss_rows: Tensor | None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> "PackedBatch":
        """Move all tensors, without waiting for the copies."""

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        sequences = Sequences(move(self.sequences.cu_seqlens), self.sequences.max_length, self.sequences.uniform)
        rows = None if self.loss_rows is None else move(self.loss_rows)
        return PackedBatch(move(self.input_ids), move(self.position_ids), move(self.labels), sequences, rows)


def pack_sequences(sequences: Sequence[tuple[Tensor, Tensor]], *, bucket: int = 1) -> PackedBatch:
    """Pack (input_ids, labels) pairs, each (length,), labels unshifted as chat-format writes them.

    Args:
        sequences: one pair per sequence, on the CPU.
        bucket: pad T up to a multiple of this with one unlabelled dummy sequence (static shapes for CUDA graphs).
    """
    ids = [pair[0].reshape(-1) for pair in sequences]
    labels = [shift_labels(pair[1].reshape(-1)) for pair in sequences]
    lengths = [row.numel() for row in ids]
    missing = -sum(lengths) % bucket
    if missing:
        ids.append(torch.zeros(missing, dtype=torch.int64))
        labels.append(torch.full((missing,), IGNORE_INDEX, dtype=torch.int64))
        lengths.append(missing)
    label_row = torch.cat(labels)
    uniform = (len(lengths), lengths[0]) if len(set(lengths)) == 1 else None
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.nonzero(label_row != IGNORE_INDEX).flatten()
    return PackedBatch(torch.cat(ids), positions, label_row, Sequences(cu_seqlens, max(lengths), uniform), rows)


def shift_labels(labels: Tensor) -> Tensor:
    """Move labels one to the left along the last dimension: position t holds what token t has to predict."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def pack_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> PackedBatch:
    """Turn a trainer's batch (B, S) into a packed one: padding is dropped, padding-free rows are cut at position 0.

    Args:
        input_ids: (B, S).
        labels: (B, S), unshifted, -100 where nothing is to be learned.
        attention_mask: (B, S), 0 at padding; None without padding.
        position_ids: (B, S); if given, a new sequence begins wherever a position is not its left neighbour's plus one.
    """
    rows, length = input_ids.shape
    if (attention_mask is None or bool(attention_mask.all())) and position_ids is None:
        return _uniform(input_ids, labels)
    pairs: list[tuple[Tensor, Tensor]] = []
    cpu = [None if t is None else t.cpu() for t in (input_ids, labels, attention_mask, position_ids)]
    ids_row, label_row, mask, positions = cpu
    assert ids_row is not None
    assert label_row is not None
    for row in range(rows):
        keep = torch.ones(length, dtype=torch.bool) if mask is None else mask[row].bool()
        starts = [0]
        if positions is not None:
            kept = positions[row][keep]
            starts += (torch.nonzero(kept.diff() != 1).flatten() + 1).tolist()
        row_ids, row_labels = ids_row[row][keep], label_row[row][keep]
        for start, end in zip(starts, [*starts[1:], row_ids.numel()], strict=True):
            if end > start:
                pairs.append((row_ids[start:end], row_labels[start:end]))
    return pack_sequences(pairs)


def _uniform(input_ids: Tensor, labels: Tensor) -> PackedBatch:
    rows, length = input_ids.shape
    device = input_ids.device
    shifted = shift_labels(labels).reshape(-1)
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    positions = torch.arange(length, device=device).repeat(rows)
    loss_rows = torch.nonzero(shifted != IGNORE_INDEX).flatten()
    sequences = Sequences(cu_seqlens, length, (rows, length))
    return PackedBatch(input_ids.reshape(-1), positions, shifted, sequences, loss_rows)


def merge_batches(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Concatenate packed batches: the gradient of the merged one is the sum of theirs."""
    if len(batches) == 1:
        return batches[0]
    shapes = {batch.sequences.uniform for batch in batches}
    uniform = None
    if len({shape and shape[1] for shape in shapes}) == 1 and None not in shapes:
        first: Any = batches[0].sequences.uniform
        uniform = (sum(batch.sequences.count for batch in batches), first[1])
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.num_tokens)
    cu_seqlens = torch.cat(
        [batches[0].sequences.cu_seqlens[:1]]
        + [batch.sequences.cu_seqlens[1:] + start for batch, start in zip(batches, starts, strict=False)]
    )
    rows = [
        (torch.arange(batch.num_tokens, device=batch.input_ids.device) if batch.loss_rows is None else batch.loss_rows)
        + start
        for batch, start in zip(batches, starts, strict=False)
    ]
    return PackedBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.position_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        Sequences(cu_seqlens, max(batch.sequences.max_length for batch in batches), uniform),
        torch.cat(rows),
    )
