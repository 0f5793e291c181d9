"""Rounded shapes of ragged micro-batches, so that attention plans and CUDA graphs serve more than one of them.

Tokens are rounded up with unlabelled dummy sequences, rows of the loss head with rows that have no label, sequences to
slots (slots.py): no gradient changes.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from finemill.kernels.engine.slots import choose_slots
from finemill.kernels.ops.packing import IGNORE_INDEX, LENGTH_STEP, Classes, LengthClass, PackedBatch, Sequences


class Shape(NamedTuple):
    """What a graph is captured for."""

    tokens: int
    labels: int
    uniform: tuple[int, int] | None
    slots: Classes


@dataclass(frozen=True)
class Buckets:
    """What numbers of tokens and of labelled rows are rounded up to, and the tokens that memory was planned for."""

    tokens: int = 512
    labels: int = 512
    most: int | None = None

    def round_tokens(self, tokens: int) -> int:
        """Round up, at most to what was planned for if the tokens are within it."""
        rounded = -(-tokens // self.tokens) * self.tokens
        return rounded if self.most is None or tokens > self.most else min(rounded, self.most)


@dataclass
class Shapes:
    """Gives batches shapes, and remembers the slots of ragged ones.

    Args:
        buckets: rounding of tokens and labels.
    """

    buckets: Buckets = field(default_factory=Buckets)
    _known: dict[tuple[int, int], list[Classes]] = field(default_factory=dict)
    """Slots by tokens and labels, in the order in which they came: the choice among them repeats from run to run."""

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """Give a batch, on the CPU, a known shape or a new one."""
        padded = pad_batch(batch, self.buckets)
        sequences = padded.sequences
        if sequences.uniform is None:
            known = self._known.setdefault((padded.num_tokens, padded.num_labels), [])
            slots = choose_slots(sequences.lengths().tolist(), known)
            if slots not in known:
                known.append(slots)
            padded.sequences = _fill_slots(sequences, slots)
        return padded

    def state(self) -> list[Any]:
        """What later batches' slots depend on, for JSON."""
        return [[list(size), known] for size, known in self._known.items()]

    def restore(self, state: list[Any]) -> None:
        """Go on from what `state` returned."""
        self._known = {
            (tokens, labels): [tuple(LengthClass(*slot) for slot in slots) for slots in known]
            for (tokens, labels), known in state
        }


def shape_of(batch: PackedBatch) -> Shape:
    """Say which shape a batch has."""
    return Shape(batch.num_tokens, batch.num_labels, batch.sequences.uniform, batch.sequences.classes)


def pad_batch(batch: PackedBatch, buckets: Buckets) -> PackedBatch:
    """Round a batch's tokens up with unlabelled sequences of the shortest class; equal-length rows stay as they are.

    Labelled rows are padded with rows that have no label, each once, so that scattering their zero gradient is exact.
    """
    tokens, sequences = batch.num_tokens, batch.sequences
    rows = batch.loss_rows
    device = batch.input_ids.device
    if rows is None:
        rows = torch.arange(tokens, device=device)
    missing = 0 if sequences.uniform is not None else buckets.round_tokens(tokens) - tokens
    capacity = min(tokens + missing, -(-rows.numel() // buckets.labels) * buckets.labels)
    ids = torch.nn.functional.pad(batch.input_ids, (0, missing))
    labels = torch.nn.functional.pad(batch.labels, (0, missing), value=IGNORE_INDEX)
    dummies = torch.arange(missing, device=device)
    positions = torch.cat([batch.position_ids, dummies % LENGTH_STEP])
    ends = tokens + torch.cat([dummies[LENGTH_STEP::LENGTH_STEP], dummies[-1:] + 1])
    cu_seqlens = torch.cat([sequences.cu_seqlens, ends.int()])
    boundaries = Sequences(cu_seqlens, max(sequences.max_length, min(missing, LENGTH_STEP)), sequences.uniform)
    if capacity > rows.numel():
        rows = torch.argsort((labels == IGNORE_INDEX).to(torch.uint8), stable=True)[:capacity]
    return PackedBatch(ids, positions, labels, boundaries, rows)


def _fill_slots(sequences: Sequences, slots: Classes) -> Sequences:
    """Append empty sequences until every slot has one."""
    missing = slots[-1].end - sequences.count
    cu_seqlens = torch.cat([sequences.cu_seqlens, sequences.cu_seqlens[-1:].expand(missing)])
    return Sequences(cu_seqlens, slots[0].bound, None, slots)
