"""CUDA graphs of whole micro-batches: one launch in place of a few thousand.

An eager launch costs the host 20 microseconds on the machine measured, a node of a graph 1 (bench/levers.md). The
forward and backward of a micro-batch, host copies included, are captured once per shape and replayed with new tokens in
the same buffers; the optimizer stays outside. Shapes are rounded up so that few graphs are needed (shapes.py). A replay
runs the very kernels of the eager pass, so it gives bitwise the same gradient as an eager pass of the same batch.

All graphs share one memory pool, used one at a time. `torch.cuda.max_memory_allocated` sees a graph's memory only while
it is captured, so the peak from the runner's construction to its last capture is kept in `peak_bytes`.
"""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemill.kernels.engine.loss_head import HeadResult
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.shapes import Shape, shape_of
from finemill.kernels.ops.packing import PackedBatch, send

MAX_GRAPHS = 32


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
        model: the engine; its plan must not change while graphs exist.
        patience: how often a shape runs eagerly before it is captured.
    """

    model: FastModel
    patience: int = 0
    peak_bytes: int = 0
    _runs: Counter[Shape] = field(default_factory=Counter)
    _graphs: dict[Shape, _Captured] = field(default_factory=dict)
    _pool: object | None = None

    def __post_init__(self) -> None:
        """Leave what loading took out of the peak."""
        torch.cuda.reset_peak_memory_stats(self.model.device)

    def loss_and_grad(self, batch: PackedBatch, scale: Tensor | float) -> HeadResult:
        """Add a micro-batch's gradient to the flat gradient, as `FastModel.loss_and_grad` does.

        A shape too many runs eagerly. The result's tensors are overwritten by the next replay of the same shape.
        """
        device = self.model.device
        shape = shape_of(batch)
        if shape not in self._graphs:
            self._runs[shape] += 1
            if self._runs[shape] <= self.patience or len(self._graphs) >= MAX_GRAPHS:
                if isinstance(scale, float):  # as a graph takes it: the same kernels are compiled
                    scale = torch.full((1,), scale, dtype=torch.float32, device=device)
                return self.model.loss_and_grad(batch.to(device), scale)
            self._graphs[shape] = self._capture(batch)
        captured = self._graphs[shape]
        _fill(captured.batch, batch)
        captured.scale.fill_(scale) if isinstance(scale, float) else captured.scale.copy_(scale)
        captured.graph.replay()
        return captured.result

    @property
    def num_graphs(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def _capture(self, batch: PackedBatch) -> _Captured:
        device = self.model.device
        static = deepcopy(batch.to(device))
        scale = torch.zeros(1, dtype=torch.float32, device=device)
        if not self.patience:
            # Compiles kernels and attention plans, sizes the host arena; a scale of zero leaves the gradient as it is.
            # Beside a graph of as many tokens and labels, attention alone can be new.
            known = any((other.tokens, other.labels) == (batch.num_tokens, batch.num_labels) for other in self._graphs)
            (self.model.rehearse_attention if known else self.model.loss_and_grad)(static, scale)
            # Without what that pass worked out from the boundaries: the graph has to.
            static.sequences = static.sequences.bare()
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
        buffer.copy_(send(values, buffer.device))
