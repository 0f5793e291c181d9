"""Packed batches: several sequences one after another in one row of tokens, and the merging of rows into such batches.

A micro-batch of B rows and the gradient-accumulation micro-batches around it are one bag of sequences. The gradient of
a sum of token losses does not depend on how the bag is cut, so rows are packed into as few token-budget batches as
memory allows; attention sees the sequence boundaries, RoPE the positions inside each sequence, the loss head the
labelled tokens only. The words, here and in engine/slots.py, engine/shapes.py and attention.py:

    row        one line of a trainer's batch (B, S): a sequence, or several that were packed, with or without padding
    sequence   tokens that attend to each other
    batch      sequences one after another, T tokens: one forward and backward
    uniform    of a batch: all B sequences have S tokens
    class      a run of neighbouring sequences of about one length; a batch that is not uniform is cut into classes
    part       the sequences of one class, or all of a uniform batch: what one call of attention takes
    padded     with empty sequences appended, up to a number that kernels were compiled for
    slots      classes with more and longer places than one batch needs, so that later batches fit as well
    bucket     the step that numbers of tokens and of labelled rows are rounded up to
    shape      what a CUDA graph is captured for: tokens, labelled rows, and uniform or slots
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
SHORTEST_CLASS = 256
"""Sequences of up to this many tokens are one length class: below it attention's time is launches and traffic."""

LENGTH_STEP = 128
"""Bounds on the length of sequences are multiples of this, so that few kernels are compiled."""


class LengthClass(NamedTuple):
    """Sequences `first` to `end` - 1 of a batch, of at most `bound` tokens each."""

    first: int
    end: int
    bound: int

    @property
    def size(self) -> int:
        """Number of sequences."""
        return self.end - self.first


Classes = tuple[LengthClass, ...]


@dataclass
class Sequences:
    """Where the sequences of a packed batch begin and end.

    Args:
        cu_seqlens: (n + 1,) int32, first token of each sequence, then T. Empty sequences are allowed.
        max_length: an upper bound on the longest sequence.
        uniform: (B, S) if the batch is B sequences of S tokens each, else None.
        classes: runs of sequences of about one length; kernels whose work grows with count x longest^2 run once for
            each.
    """

    cu_seqlens: Tensor
    max_length: int
    uniform: tuple[int, int] | None = None
    classes: Classes = ()
    padded: "Sequences | None" = field(default=None, repr=False)
    """The same with empty sequences appended, kept for kernels that are compiled for a rounded count."""
    _offsets: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _lengths: Tensor | None = field(default=None, repr=False)
    _parts: "list[Sequences] | None" = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """Number of sequences, empty ones included."""
        return self.cu_seqlens.numel() - 1

    def parts(self) -> "list[Sequences]":
        """One object for each class, of absolute boundaries; this one alone without classes."""
        if self._parts is None:
            runs = self.classes
            self._parts = [Sequences(self.cu_seqlens[run.first : run.end + 1], run.bound) for run in runs] or [self]
        return self._parts

    def bare(self) -> "Sequences":
        """The same boundaries, without what has been worked out from them."""
        return Sequences(self.cu_seqlens, self.max_length, self.uniform, self.classes)

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

    @property
    def num_labels(self) -> int:
        """M; unlabelled rows that a graph's shape was padded with count as well."""
        return self.num_tokens if self.loss_rows is None else self.loss_rows.numel()

    def to(self, device: torch.device) -> "PackedBatch":
        """Move all tensors, without waiting for the copies."""
        old = self.sequences
        sequences = Sequences(send(old.cu_seqlens, device), old.max_length, old.uniform, old.classes)
        rows = None if self.loss_rows is None else send(self.loss_rows, device)
        ids, positions, labels = (send(t, device) for t in (self.input_ids, self.position_ids, self.labels))
        return PackedBatch(ids, positions, labels, sequences, rows)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting: from pageable memory a copy would wait for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pack_sequences(sequences: Sequence[tuple[Tensor, Tensor]]) -> PackedBatch:
    """Pack (input_ids, labels) pairs, each (length,), on the CPU, labels unshifted as chat-format writes them."""
    ids = [pair[0].reshape(-1) for pair in sequences]
    labels = [shift_labels(pair[1].reshape(-1)) for pair in sequences]
    lengths = [row.numel() for row in ids]
    label_row = torch.cat(labels)
    # Equal sequences of any length would need attention plans and a graph of their own.
    alike = len(set(lengths)) == 1 and lengths[0] % SHORTEST_CLASS == 0
    uniform = (len(lengths), lengths[0]) if alike else None
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.nonzero(label_row != IGNORE_INDEX).flatten()
    boundaries = Sequences(cu_seqlens, max(lengths), uniform, () if uniform else length_classes(lengths))
    return PackedBatch(torch.cat(ids), positions, label_row, boundaries, rows)


def length_classes(lengths: Sequence[int]) -> Classes:
    """Cut sequences into runs within factors of two; few and tight where the longest come first.

    Bounds are rounded up to quarters of the power of two above, so that few kernels are compiled. A run also takes the
    shorter sequences before a longer one.
    """
    longest = [*accumulate(reversed(lengths), max)][::-1]  # from here on
    powers = [max(SHORTEST_CLASS, 1 << (length - 1).bit_length()) for length in longest]
    starts = [index for index, power in enumerate(powers) if index == 0 or power != powers[index - 1]]
    steps = [max(LENGTH_STEP, powers[first] // 4) for first in starts]
    bounds = [-(-max(1, longest[first]) // step) * step for first, step in zip(starts, steps, strict=True)]
    return tuple(map(LengthClass, starts, [*starts[1:], len(lengths)], bounds)) if lengths else ()


def round_count(count: int) -> int:
    """Round a number of sequences up to 1, 2, 3, 4, 6, 8, 12, ...: few plans, a third of them empty at most."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


def shift_labels(labels: Tensor) -> Tensor:
    """Move labels one to the left along the last dimension: position t holds what token t has to predict."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def splittable(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether `split_rows` keeps the meaning of a batch: one of the two at most, and no holes in the mask.

    With a mask transformers attends across restarting positions, and a hole moves what follows it; cutting loses both.
    """
    if attention_mask is None:
        return position_ids is None or position_ids.dim() == 2
    if position_ids is not None or attention_mask.dim() != 2:
        return False
    kept = attention_mask != 0
    ends = torch.nn.functional.pad(kept, (1, 1)).to(torch.int8).diff().abs().sum(-1)
    return bool((ends <= 2).all())


def split_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Cut a trainer's batch (B, S) into its sequences, without padding.

    Args:
        input_ids: (B, S).
        labels: (B, S), unshifted, -100 where nothing is to be learned.
        attention_mask: (B, S), 0 at padding; None without padding.
        position_ids: (B, S); if given, a new sequence begins wherever a position is not its left neighbour's plus one.
    Returns: (input_ids, labels) of every sequence, (length,) each, on the CPU.
    Raises: ValueError: a mask with holes, or both a mask and positions (see `splittable`).
    """
    if not splittable(attention_mask, position_ids):
        raise ValueError("rows cannot be cut: attention_mask has holes or comes with position_ids")
    ids_rows, label_rows = input_ids.cpu(), labels.cpu()
    mask = None if attention_mask is None else attention_mask.cpu().bool()
    positions = None if position_ids is None else position_ids.cpu()
    pairs: list[tuple[Tensor, Tensor]] = []
    for row in range(input_ids.shape[0]):
        keep = slice(None) if mask is None else mask[row]
        ids, label_row = ids_rows[row][keep], label_rows[row][keep]
        sizes = [ids.numel()]
        if positions is not None:
            starts = torch.nonzero(positions[row][keep].diff() != 1).flatten() + 1
            sizes = torch.diff(starts, prepend=starts.new_zeros(1), append=starts.new_tensor([ids.numel()])).tolist()
        pairs += [pair for pair in zip(ids.split(sizes), label_row.split(sizes), strict=True) if pair[0].numel()]
    return pairs


def pack_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> PackedBatch:
    """Turn a trainer's batch into one packed batch; arguments as `split_rows`.

    Rows of equal length without padding stay where they are, on the device or not.
    """
    if position_ids is None and (attention_mask is None or bool(attention_mask.all())):
        return _uniform(input_ids, labels)
    return pack_sequences(split_rows(input_ids, labels, attention_mask, position_ids))


def pack_longest_first(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> tuple[PackedBatch, Tensor]:
    """Pack a trainer's batch, the longest rows first, so that few classes are needed; arguments as `split_rows`.

    Returns: the batch on the CPU, and (T,) where each of its tokens stands in (B, S), counted row by row.
    """
    rows, length = input_ids.shape
    kept = torch.ones((rows, length), dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    order = torch.argsort(kept.sum(1), descending=True, stable=True)
    masks = kept[order]
    pairs = split_rows(input_ids.cpu()[order], labels.cpu()[order], masks)
    places = torch.arange(rows * length).view(rows, length)[order][masks]
    return pack_sequences(pairs), places


def pack_budget(sequences: Sequence[tuple[Tensor, Tensor]], budget: int) -> list[PackedBatch]:
    """Pack sequences into few batches of at most `budget` tokens (a longer sequence gets a batch of its own).

    Each batch is as full as the sequences left allow, and of all ways to fill it so the one with the longest: sequences
    of like length meet, and no short batch is left over, whose layers would take as long to decode and recompute. The
    longest come first. The same sequences always give the same batches.
    """
    left = sorted(sequences, key=lambda pair: -pair[0].numel())
    batches = []
    while left:
        chosen = _fill([ids.numel() for ids, _ in left], budget)
        batches.append(pack_sequences([pair for pair, inside in zip(left, chosen, strict=True) if inside]))
        left = [pair for pair, inside in zip(left, chosen, strict=True) if not inside]
    return batches


def _fill(sizes: Sequence[int], budget: int) -> list[bool]:
    """Choose sizes, given longest first, with the largest sum within the budget; the first alone if it is beyond."""
    if sizes[0] > budget:
        return [index == 0 for index in range(len(sizes))]
    within = (1 << budget + 1) - 1
    sums = [1]  # bit s of sums[n]: some of the n shortest add up to s
    for size in reversed(sizes):
        sums.append((sums[-1] | sums[-1] << size) & within)
    rest = sums.pop().bit_length() - 1
    chosen = []
    for size in sizes:
        shorter = sums.pop()
        chosen.append(size <= rest and bool(shorter >> rest - size & 1))
        rest -= size * chosen[-1]
    return chosen


def _uniform(input_ids: Tensor, labels: Tensor) -> PackedBatch:
    rows, length = input_ids.shape
    device = input_ids.device
    shifted = shift_labels(labels).reshape(-1)
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    positions = torch.arange(length, device=device).repeat(rows)
    loss_rows = torch.nonzero(shifted != IGNORE_INDEX).flatten()
    sequences = Sequences(cu_seqlens, length, (rows, length))
    return PackedBatch(input_ids.reshape(-1), positions, shifted, sequences, loss_rows)
