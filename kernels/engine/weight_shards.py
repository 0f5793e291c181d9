"""A layer's packed weights divided among the GPUs of a host: each keeps a part of every layer and reads the others'.

The part lies in memory that the other processes map once (CUDA's interprocess handles; shared memory on a CPU), and a
layer is gathered by copies between the cards: one-sided, because frozen weights never change. No process waits for
another, whatever it runs: another number of micro-batches, an evaluation, a step begun again. A copy occupies no
multiprocessor, and a CUDA graph captures it like any other.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finemill.errors import UserError
from finemill.kernels.engine.host_memory import ALIGNMENT


class WeightShards:
    """One process's part of all layers, and its view of the others' parts.

    Args:
        rank: of this process among those of the host.
        count: how many share the weights.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._parts: list[Tensor] = []

    @classmethod
    def of_host(cls) -> "WeightShards":
        """Share weights among all processes that torchrun started on this host."""
        return cls(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))

    def allocate(self, num_layers: int, size: int, device: torch.device) -> int:
        """Make room for a part of layers of `size` bytes. Returns: bytes of a layer in whole parts."""
        self._width = -(-size // (self.count * ALIGNMENT)) * ALIGNMENT
        self._mine = _shareable(num_layers * self._width, device).view(num_layers, self._width)
        return self.count * self._width

    def put(self, layer: int, block: Tensor) -> None:
        """Keep this process's part of a layer's bytes, which are those of whole parts."""
        self._mine[layer].copy_(block[self.rank * self._width : (self.rank + 1) * self._width])

    def connect(self) -> None:
        """Map the other processes' parts, once all have put all layers; every process of the group calls it.

        Raises: UserError: a process cannot map another one's memory.
        """
        device = self._mine.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        first = torch.distributed.get_rank() - self.rank
        handles = _exchange(_handle(self._mine))[first : first + self.count]
        problem = None
        try:
            others = [None if rank == self.rank else _open(handle, device) for rank, handle in enumerate(handles)]
            self._parts = [self._mine if part is None else part.view(self._mine.shape) for part in others]
        except RuntimeError as error:
            problem = f"process {first + self.rank}: {' '.join(str(error).split()):.160}"
        # Nobody goes on, and may free its part, before all have mapped it, or all know that one could not.
        if problem := next(filter(None, _exchange(problem)), None):
            raise UserError(
                f"strategy 'shard': a GPU's memory cannot be read by the others ({problem}); use 'ddp' or 'fsdp2'"
            )

    def close(self) -> None:
        """Unmap the others' parts, and let the own one go when all have; every process of the group calls it.

        PyTorch asks of whoever shares a GPU's memory to keep it until nobody has it mapped: it would complain at the
        end of a process whose part is still counted as another's. No layer can be gathered from then on.
        """
        device = self._mine.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a layer may still be on its way
        self._parts = []
        _exchange(None)
        del self._mine
        if device.type == "cuda":
            torch.cuda.ipc_collect()

    def pieces(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """Yield where each part of a layer begins, and the part; every process begins with another one."""
        for step in range(self.count):
            rank = (self.rank + step) % self.count
            yield rank * self._width, self._parts[rank][layer]


def _exchange(mine: object) -> list[Any]:
    """What every process gives, by rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def _shareable(size: int, device: torch.device) -> Tensor:
    """Allocate bytes that other processes can map: of a plain allocation, whatever segments torch uses otherwise."""
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    with _without_expandable_segments():
        return torch.empty(size, dtype=torch.uint8, device=device)


@contextmanager
def _without_expandable_segments() -> Iterator[None]:
    """Opening an expandable segment takes the right to trace the process that owns it, which containers withhold."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    if "expandable_segments:True" not in settings:
        yield
        return
    set_allocator = torch._C._accelerator_setAllocatorSettings
    set_allocator(settings.replace("expandable_segments:True", "expandable_segments:False"))
    try:
        yield
    finally:
        set_allocator(settings)


def _handle(tensor: Tensor) -> tuple[Any, ...]:
    """What another process needs to map a tensor's memory."""
    storage = tensor.untyped_storage()
    handle: tuple[Any, ...] = storage._share_cuda_()[1:] if tensor.is_cuda else storage._share_filename_cpu_()
    return handle


def _open(handle: tuple[Any, ...], device: torch.device) -> Tensor:
    """Map another process's memory, as bytes.

    On a GPU in the context of this process's own card: one in that of the owner's would take 0.5 GB there.
    """
    if device.type == "cuda":
        *where, _ = handle  # no event to wait for: the writes were over when the handles were exchanged
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *where, False)
    else:
        storage = torch.UntypedStorage._new_shared_filename_cpu(*handle)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
