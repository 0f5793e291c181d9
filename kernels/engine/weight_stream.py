"""NF4 weights that live in pinned host memory and visit the device one layer ahead of their use.

Every layer's codes and scales lie in one pinned block of equal layout. Two device slots alternate: while a layer
computes from one, the next layer's block is copied into the other. A micro-batch reads the base twice (forward, then
backward with its recompute), so the copies hide behind the computation from about 2,000 tokens per micro-batch on a
Hopper card (95 MiB a layer of Qwen3-8B at 46 to 54 GB/s). Decoded values are the same bits as from resident weights.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finemill.kernels.engine.host_memory import ALIGNMENT, pinned_bytes
from finemill.kernels.ops.nf4 import NF4Tensor


class WeightStream:
    """Host blocks and device slots of a model's layers.

    Args:
        layers: the NF4 weights of each layer, in one order and of the same shapes in all layers.
        device: where they are needed.
    """

    def __init__(self, layers: Sequence[Sequence[NF4Tensor]], device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._ranges: list[list[tuple[int, int]]] = []
        size = 0
        for weight in layers[0]:
            ranges = []
            for tensor in _streamed(weight):
                ranges.append((size, size + tensor.nbytes))
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            self._ranges.append(ranges)
        self._blocks = [pinned_bytes(size) for _ in layers]
        for block, weights in zip(self._blocks, layers, strict=True):
            for weight, ranges in zip(weights, self._ranges, strict=True):
                for tensor, (begin, end) in zip(_streamed(weight), ranges, strict=True):
                    block[begin:end].view(tensor.dtype).copy_(tensor.reshape(-1))
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._ready: list[torch.cuda.Event | None] = [None, None]
        self._holds: list[int | None] = [None, None]

    def views(self, layer: int, weights: Sequence[NF4Tensor]) -> list[NF4Tensor]:
        """Return a layer's weights as views of the slot it will visit."""
        slot = self._slots[layer % 2]
        found = []
        for weight, ranges in zip(weights, self._ranges, strict=True):
            packed, absmax, *nested = (
                slot[begin:end].view(tensor.dtype)
                for tensor, (begin, end) in zip(_streamed(weight), ranges, strict=True)
            )
            found.append(replace(weight, packed=packed, absmax=absmax, nested_absmax=nested[0] if nested else None))
        return found

    def begin(self) -> None:
        """Forget what the slots hold: a captured graph must copy everything it uses itself."""
        self._holds = [None, None]

    def prefetch(self, layer: int) -> None:
        """Start copying a layer into its slot, after everything enqueued so far (the slot's last readers)."""
        if not 0 <= layer < len(self._blocks) or self._holds[layer % 2] == layer:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._slots[layer % 2].copy_(self._blocks[layer], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._ready[layer % 2], self._holds[layer % 2] = event, layer

    def wait(self, layer: int) -> None:
        """Let the device wait for a layer's copy."""
        self.prefetch(layer)
        event = self._ready[layer % 2]
        assert event is not None
        torch.cuda.current_stream(self.device).wait_event(event)


def _streamed(weight: NF4Tensor) -> list[Tensor]:
    """The tensors of a weight whose size grows with it."""
    return [t for t in (weight.packed, weight.absmax, weight.nested_absmax) if t is not None]
