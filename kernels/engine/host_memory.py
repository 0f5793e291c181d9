"""Tensors kept in pinned host memory between uses: saved activations, NF4 weights, the embedding.

Copies run on two side streams, one per direction, beside the computation (54 GB/s one way, 46 each way at once, without
slowing GEMMs; bench/levers.md). Order between streams is by events only, and a tensor's device memory is released a
known number of layers later, so that memory use repeats exactly and everything can be captured in a CUDA graph.
"""

import contextlib
import mmap
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import use_kernel

ALIGNMENT = 512
CGROUP = Path("/sys/fs/cgroup")


def pinned_bytes(size: int) -> Tensor:
    """Allocate page-locked host memory of exactly `size` bytes (torch's pinned allocator rounds up to 2^n).

    Returns: (size,) uint8. The memory is unlocked when the last tensor over it is gone; child processes do not have it.
    """
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or without huge pages
        memory.madvise(mmap.MADV_DONTFORK)  # a copy on write would part the device's pages from ours
        memory.madvise(mmap.MADV_HUGEPAGE)
    host = torch.frombuffer(memory, dtype=torch.uint8)[:size]
    if size and torch.cuda.is_available():
        host.zero_()  # all threads touch the pages; page-locking would do it with one, at half the speed
        error = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), len(memory), 0))
        if error:
            raise MemoryError(f"cudaHostRegister failed with error {error} for {size} bytes of host memory")
        weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, host.data_ptr())
    return host


def free_host_bytes() -> int:
    """Host memory that this process may lock: its part of nine tenths of what the machine and the container leave."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no limit, or not version 2 of control groups
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = sum(int(size) for name, size in lines if name in ("active_file", "inactive_file"))
        free = min(free, limit - used + cached)  # files that were read give way
    return max(0, free) * 9 // 10 // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def pin(tensor: Tensor) -> Tensor:
    """Copy a tensor into page-locked host memory."""
    host = pinned_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return host.copy_(tensor)


@dataclass
class _Parked:
    """A tensor on its way to, in, or back from host memory."""

    host: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device_copy: Tensor | None = None
    ready: torch.cuda.Event | None = None


@dataclass
class HostArena:
    """A slab of pinned memory handed out in slices, all of which are free again after `reset`."""

    device: torch.device
    slab: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _used: int = 0

    def __post_init__(self) -> None:
        """Make the side streams."""
        self.to_host = torch.cuda.Stream(self.device)
        self.to_device = torch.cuda.Stream(self.device)
        self._in_flight: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._growing: threading.Thread | None = None
        self._grown: Tensor | None = None

    def grow(self, size: int) -> None:
        """Begin to make the slab at least `size` bytes, in a thread: a GB takes 0.05 s in huge pages, 0.3 s without."""

        def work() -> None:
            with torch.cuda.device(self.device):
                self._grown = pinned_bytes(size)

        if size > self.slab.numel() and self._growing is None:
            # Not a daemon: an interpreter that ends meanwhile would abort.
            self._growing = threading.Thread(target=work)
            self._growing.start()

    def reserve(self, size: int) -> None:
        """Make the slab at least `size` bytes. Not while a graph is being captured."""
        if self._growing is not None:
            self._growing.join()
            self._growing = None
        grown, self._grown = self._grown, None
        if size > self.slab.numel() or grown is not None:
            torch.cuda.synchronize(self.device)
            self.slab = grown if grown is not None and grown.numel() >= size else pinned_bytes(size)

    def reset(self) -> None:
        """Forget all slices: nothing parked before may be fetched after."""
        self._used = 0

    def park(self, tensors: list[Tensor], keep_layers: int) -> list[_Parked]:
        """Start copying tensors to the host.

        Args:
            tensors: dense, possibly with row pitch; not to be written any more.
            keep_layers: how many later calls may pass before this one's device memory is waited for and released; with
                one, two parked layers in a row wait for the bus even where it is idle later.
        """
        parked = []
        self.to_host.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.to_host):
            for tensor in tensors:
                size = tensor.untyped_storage().nbytes()
                host = self.slab[self._used : self._used + size]
                if host.numel() < size:
                    raise MemoryError(f"host arena of {self.slab.numel()} bytes is full")
                self._used += -(-size // ALIGNMENT) * ALIGNMENT
                flat = torch.empty(0, dtype=torch.uint8, device=self.device).set_(tensor.untyped_storage())
                host.copy_(flat, non_blocking=True)
                parked.append(_Parked(host, tensor.shape, tensor.stride(), tensor.dtype))
            event = torch.cuda.Event()
            event.record(self.to_host)
        self._in_flight.append((event, tensors))
        while len(self._in_flight) > keep_layers:
            self._release()
        return parked

    def drain(self) -> None:
        """Wait, on the device, for all copies to the host, and release their device memory."""
        while self._in_flight:
            self._release()

    def _release(self) -> None:
        event, tensors = self._in_flight.popleft()
        torch.cuda.current_stream(self.device).wait_event(event)
        tensors.clear()

    def prefetch(self, parked: list[_Parked]) -> None:
        """Start copying tensors back to the device, into memory allocated now."""
        for item in parked:
            item.device_copy = torch.empty(item.host.numel(), dtype=torch.uint8, device=self.device)
        self.to_device.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.to_device):
            for item in parked:
                assert item.device_copy is not None
                item.device_copy.copy_(item.host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.to_device)
        for item in parked:
            item.ready = event

    def take(self, item: _Parked) -> Tensor:
        """Return a prefetched tensor; the device waits for its copy."""
        assert item.device_copy is not None
        assert item.ready is not None
        torch.cuda.current_stream(self.device).wait_event(item.ready)
        storage = item.device_copy.untyped_storage()
        item.device_copy = None
        return torch.empty(0, dtype=item.dtype, device=self.device).set_(storage, 0, item.shape, item.stride)


@triton.jit
def _gather_rows_kernel(table_ptr, index_ptr, out_ptr, table_stride, out_stride, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index_ptr + row).to(tl.int64)
    value = tl.load(table_ptr + source * table_stride + column, mask=column < WIDTH, other=0.0)
    tl.store(out_ptr + row * out_stride + column, value, mask=column < WIDTH)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Look up rows of an embedding that may live in pinned host memory.

    Args:
        table: (V, H), on index's device or in pinned host memory, which the kernel then reads over the bus.
        index: (T,) integers.
    Returns: (T, H) on index's device.
    """
    if table.device == index.device or not use_kernel(index):
        return torch.nn.functional.embedding(index, table)
    out = torch.empty((index.numel(), table.shape[1]), dtype=table.dtype, device=index.device)
    grid = (index.numel(), triton.cdiv(table.shape[1], BLOCK_COLUMNS))
    _gather_rows_kernel[grid](
        table,
        index,
        out,
        table.stride(0),
        out.stride(0),
        table.shape[1],
        BLOCK=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


BLOCK_COLUMNS = 1024
