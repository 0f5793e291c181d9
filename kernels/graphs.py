"""CUDA graphs of whole micro-batches: one launch in place of a few thousand.

An eager launch costs the host 20 microseconds on the machine measured (results.md), a node of a graph 1. The forward
and backward of a micro-batch, host copies included, are captured once per shape and replayed with new tokens in the
same buffers; the optimizer stays outside. Shapes are rounded up so that few graphs are needed: tokens to a bucket with
one unlabelled dummy sequence, labelled rows and the number of sequences likewise. A replay runs the very kernels of the
eager pass, so it gives bitwise the same gradient as an eager pass of the same padded batch.

All graphs share one memory pool, used one at a time. `torch.cuda.max_memory_allocated` sees a graph's memory only while
it is captured, so the peak from the runner's construction to its last capture is kept in `peak_bytes`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemill.kernels.loss_head import HeadResult
from finemill.kernels.model import FastModel
from finemill.kernels.packing import IGNORE_INDEX, PackedBatch, Sequences

MAX_GRAPHS = 32


@dataclass(frozen=True)
class Buckets:
    """What shapes are rounded up to: tokens, labelled rows, sequences, longest sequence."""

    tokens: int = 512
    labels: int = 512
    sequences: int = 16
    length: int = 128


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    scale: Tensor
    result: HeadResult
    memory: list[Tensor]


@dataclass
class GraphRunner:
    """Runs micro-batches of a model through captured graphs.

    Args:
        model: the engine; its plan must not change while graphs exist (`reset` drops them).
        buckets: rounding of shapes.
    """

    model: FastModel
    buckets: Buckets = field(default_factory=Buckets)
    peak_bytes: int = 0
    _graphs: dict[tuple[object, ...], _Captured] = field(default_factory=dict)
    _pool: object | None = None

    def __post_init__(self) -> None:
        """Leave what loading took out of the peak."""
        torch.cuda.reset_peak_memory_stats(self.model.device)

    def loss_and_grad(self, batch: PackedBatch, scale: Tensor | float) -> HeadResult:
        """Add a micro-batch's gradient to the flat gradient, as `FastModel.loss_and_grad` does.

        The result's tensors are overwritten by the next replay of the same shape.
        """
        batch = pad_batch(batch, self.buckets)
        rows = batch.loss_rows
        assert rows is not None
        sequences = batch.sequences
        key = (batch.num_tokens, rows.numel(), sequences.uniform, sequences.count, sequences.max_length)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                return self.model.loss_and_grad(batch.to(self.model.device), scale)
            self._graphs[key] = self._capture(batch)
        captured = self._graphs[key]
        _fill(captured.batch, batch)
        captured.scale.fill_(scale) if isinstance(scale, float) else captured.scale.copy_(scale)
        captured.graph.replay()
        return captured.result

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def reset(self) -> None:
        """Drop all graphs, before the plan changes."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, batch: PackedBatch) -> _Captured:
        device = self.model.device
        static = batch.to(device)
        static = PackedBatch(
            static.input_ids.clone(),
            static.position_ids.clone(),
            static.labels.clone(),
            Sequences(static.sequences.cu_seqlens.clone(), batch.sequences.max_length, batch.sequences.uniform),
            None if static.loss_rows is None else static.loss_rows.clone(),
        )
        scale = torch.zeros(1, dtype=torch.float32, device=device)
        # Compiles kernels and attention plans, sizes the host arena; a scale of zero leaves the gradient as it is.
        self.model.loss_and_grad(static, scale)
        static.sequences = Sequences(static.sequences.cu_seqlens, batch.sequences.max_length, batch.sequences.uniform)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads (a data loader's pinning) may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            result = self.model.loss_and_grad(static, scale)
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device))
        return _Captured(graph, static, scale, result, self.model.replaceable())


def pad_batch(batch: PackedBatch, buckets: Buckets) -> PackedBatch:
    """Round a batch's shapes up with unlabelled tokens and empty sequences; equal-length rows stay as they are.

    Labelled rows are padded with rows that have no label, each once, so that scattering their zero gradient is exact.
    """
    tokens, sequences = batch.num_tokens, batch.sequences
    rows = batch.loss_rows
    device = batch.input_ids.device
    if rows is None:
        rows = torch.arange(tokens, device=device)
    missing = 0 if sequences.uniform is not None else -tokens % buckets.tokens
    capacity = min(tokens + missing, -(-rows.numel() // buckets.labels) * buckets.labels)
    aligned = sequences.uniform is not None or (
        sequences.count % buckets.sequences == 0 and sequences.max_length % buckets.length == 0
    )
    if not missing and capacity == rows.numel() and aligned:
        # Without length classes, which would need a graph each.
        boundaries = Sequences(sequences.cu_seqlens, sequences.max_length, sequences.uniform)
        return PackedBatch(batch.input_ids, batch.position_ids, batch.labels, boundaries, rows)
    ids, positions, labels, cu_seqlens = batch.input_ids, batch.position_ids, batch.labels, sequences.cu_seqlens
    longest = sequences.max_length
    if missing:
        ids = torch.nn.functional.pad(ids, (0, missing))
        positions = torch.cat([positions, torch.arange(missing, device=device)])
        labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORE_INDEX)
        cu_seqlens = torch.nn.functional.pad(cu_seqlens, (0, 1), value=tokens + missing)
        longest = max(longest, missing)
    if sequences.uniform is None:
        empty = -(cu_seqlens.numel() - 1) % buckets.sequences
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(empty)])
        longest = -(-longest // buckets.length) * buckets.length
    if capacity > rows.numel():
        rows = torch.argsort((labels == IGNORE_INDEX).to(torch.uint8), stable=True)[:capacity]
    return PackedBatch(ids, positions, labels, Sequences(cu_seqlens, longest, sequences.uniform), rows)


def _fill(target: PackedBatch, source: PackedBatch) -> None:
    """Copy a batch into a graph's buffers, without waiting."""
    pairs = [
        (target.input_ids, source.input_ids),
        (target.position_ids, source.position_ids),
        (target.labels, source.labels),
        (target.sequences.cu_seqlens, source.sequences.cu_seqlens),
    ]
    if target.loss_rows is not None and source.loss_rows is not None:
        pairs.append((target.loss_rows, source.loss_rows))
    for buffer, values in pairs:
        buffer.copy_(values.pin_memory() if values.device.type == "cpu" else values, non_blocking=True)
