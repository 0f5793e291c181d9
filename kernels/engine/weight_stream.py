"""NF4 weights that live in pinned host memory, or in parts on several GPUs, and visit the device a layer ahead of use.

Every layer's codes and scales lie in one block of equal layout. Two device slots alternate: while a layer computes from
one, the next layer's block is copied into the other. Some layers may stay on the device: while they compute, both slots
are filled. A micro-batch reads the base twice (forward, then backward with its recompute), so the copies hide behind
the computation from about 2,000 tokens per micro-batch on a Hopper card with weights on the host (95 MiB a layer of
Qwen3-8B at 46 to 54 GB/s), and from a few hundred with parts on other cards (weight_shards.py). Decoded values are the
same bits as from resident weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from finemill.kernels.engine.host_memory import ALIGNMENT, pinned_bytes
from finemill.kernels.engine.weight_shards import WeightShards
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack

Quantized = TypeVar("Quantized", bound=NF4Tensor | NF4Stack)


class WeightStream:
    """Blocks and device slots of a model's layers.

    Args:
        like: the NF4 weights of one layer; those of all others have the same shapes in the same order.
        num_layers: how many there will be.
        device: where they are needed. On a CPU a copy is done when it is asked for.
        shards: hold the blocks in parts; `connect` them when all layers are put. None for the host's memory.
    """

    def __init__(
        self,
        like: Sequence[NF4Tensor | NF4Stack],
        num_layers: int,
        device: torch.device,
        shards: WeightShards | None = None,
    ) -> None:
        self.device, self.shards = device, shards
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ranges: list[list[tuple[int, int]]] = []
        size = 0
        for weight in like:
            ranges = []
            for tensor in _streamed(weight):
                ranges.append((size, size + tensor.nbytes))
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            self._ranges.append(ranges)
        self._size = size if shards is None else shards.allocate(num_layers, size, device)
        self._blocks: dict[int, Tensor] = {}
        self._resident: dict[int, Tensor] = {}
        self._visits = list(range(num_layers))
        """Layers that visit the slots, in forward order."""
        self._slots = [self._empty() for _ in range(2)]
        self._ready: list[torch.cuda.Event | None] = [None, None]
        self._holds: list[int | None] = [None, None]

    def put(self, layer: int, weights: Sequence[Quantized]) -> list[Quantized]:
        """Copy a layer's weights to where they wait. Returns: the same weights as views of the slot they will visit."""
        block = self._empty() if self.shards else pinned_bytes(self._size)
        for weight, ranges in zip(weights, self._ranges, strict=True):
            for tensor, (begin, end) in zip(_streamed(weight), ranges, strict=True):
                block[begin:end].view(tensor.dtype).copy_(tensor.reshape(-1))
        if self.shards is None:
            self._blocks[layer] = block
        else:
            self.shards.put(layer, block)
        return self.locate(layer, weights)

    def place(self, streamed: Sequence[bool]) -> bool:
        """Choose which layers visit the slots; the others stay on the device. Returns: whether any layer moved.

        What `put` and `locate` returned before is of no use then: `locate` every layer again.
        """
        visits = [layer for layer, visits in enumerate(streamed) if visits]
        if visits == self._visits:
            return False
        self._visits = visits
        for layer in set(self._resident) & set(visits):
            del self._resident[layer]
        self.begin()
        return True

    def locate(self, layer: int, weights: Sequence[Quantized]) -> list[Quantized]:
        """Return a layer's weights where they are when they are needed: in their slot, or where they stay."""
        if layer in self._visits:
            return self._views(self._slots[self._slot(layer)], weights)
        if layer not in self._resident:
            self._resident[layer] = self._empty()
            self._copy(layer, self._resident[layer])
        return self._views(self._resident[layer], weights)

    def take(self, layer: int, weights: Sequence[Quantized]) -> list[Quantized]:
        """Return a layer's weights in device memory of their own, from what `put` returned."""
        memory = self._empty()
        self._copy(layer, memory)
        return self._views(memory, weights)

    def begin(self) -> None:
        """Forget what the slots hold: a captured graph must copy everything it uses itself."""
        self._holds = [None, None]

    def visit(self, layer: int, *, backward: bool = False) -> None:
        """Have a layer's weights on the device, and the weights that are needed after it on their way."""
        if layer in self._visits:
            self._wait(layer)
        after = [v for v in reversed(self._visits) if v < layer] if backward else [v for v in self._visits if v > layer]
        for following in after[: 1 if layer in self._visits else 2]:
            self._prefetch(following)

    def _prefetch(self, layer: int) -> None:
        """Start copying a layer into its slot, after everything enqueued so far (the slot's last readers)."""
        index = self._slot(layer)
        if self._holds[index] == layer:
            return
        slot = self._slots[index]
        if self._stream is None:
            self._copy(layer, slot)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._copy(layer, slot)
                event = torch.cuda.Event()
                event.record(self._stream)
            self._ready[index] = event
        self._holds[index] = layer

    def _wait(self, layer: int) -> None:
        """Let the device wait for a layer's copy."""
        self._prefetch(layer)
        if (event := self._ready[self._slot(layer)]) is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _empty(self) -> Tensor:
        return torch.empty(self._size, dtype=torch.uint8, device=self.device)

    def _copy(self, layer: int, memory: Tensor) -> None:
        """Copy a layer's block into device memory."""
        for begin, piece in [(0, self._blocks[layer])] if self.shards is None else self.shards.pieces(layer):
            memory[begin : begin + piece.numel()].copy_(piece, non_blocking=True)

    def _slot(self, layer: int) -> int:
        return self._visits.index(layer) % 2

    def _views(self, memory: Tensor, weights: Sequence[Quantized]) -> list[Quantized]:
        found: list[Quantized] = []
        for weight, ranges in zip(weights, self._ranges, strict=True):
            packed, absmax, *nested = (
                memory[begin:end].view(tensor.dtype).view(tensor.shape)
                for tensor, (begin, end) in zip(_streamed(weight), ranges, strict=True)
            )
            found.append(replace(weight, packed=packed, absmax=absmax, nested_absmax=nested[0] if nested else None))
        return found


def _streamed(weight: NF4Tensor | NF4Stack) -> list[Tensor]:
    """The tensors of a weight whose size grows with it."""
    return [t for t in (weight.packed, weight.absmax, weight.nested_absmax) if t is not None]
