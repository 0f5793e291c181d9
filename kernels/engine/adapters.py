"""All LoRA tensors of a model as views of one flat fp32 master, with one flat fp32 gradient.

PEFT keeps two parameters per adapted layer: 504 tensors on Qwen3-8B. Here each stays the parameter it was, so PEFT,
checkpoints and optimizers find it, but its memory is a slice of `master` and its gradient a slice of `grad`; the
optimizer steps over the flat tensors (optimizer.py). Each group of layers over one input (projection.py) has its G
adapters stacked, A (G r, K) and then B (N, r), so that one launch serves the group. A member without an adapter, or of
a smaller rank, is padded with zeros: their gradients are exactly zero, so they stay zero.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# G members of a group, r largest rank among them, K input width, N output width of all members

ALIGNMENT = 64
"""Elements each group's offset is a multiple of: 256 bytes, what vector loads and cuBLAS want."""


@dataclass(frozen=True)
class LoraPair:
    """One layer's LoRA parameters: a (r, K), b (N_i, r), and the factor of their product."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


@dataclass
class GroupAdapter:
    """The stacked adapters of one group: a (G r, K), b (N, r), fp32 views of the master, and of the gradient."""

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scaling: float
    widths: tuple[int, ...]

    @property
    def rank(self) -> int:
        """G r."""
        return self.a.shape[0]


@dataclass
class _Slot:
    parameter: nn.Parameter
    dtype: torch.dtype
    master: Tensor
    grad: Tensor


@dataclass
class _Request:
    pairs: list[LoraPair | None]
    widths: tuple[int, ...]
    in_features: int
    start: int
    rank: int

    @property
    def size_a(self) -> int:
        return len(self.pairs) * self.rank * self.in_features

    @property
    def size(self) -> int:
        return self.size_a + sum(self.widths) * self.rank


@dataclass
class FlatAdapters:
    """The flat master and gradient. Reserve every group, then call `build` once."""

    device: torch.device
    _requests: list[_Request] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _size: int = 0
    master: Tensor = field(init=False)
    grad: Tensor = field(init=False)

    def reserve(self, pairs: list[LoraPair | None], widths: tuple[int, ...], in_features: int) -> int | None:
        """Reserve room for a group's adapters. Returns: a ticket for `group`, or None if no member is adapted.

        Raises: ValueError: members with different scalings.
        """
        adapted = [pair for pair in pairs if pair is not None]
        if not adapted:
            return None
        if len({pair.scaling for pair in adapted}) > 1:
            raise ValueError(f"adapters over one input have scalings {sorted(pair.scaling for pair in adapted)}")
        rank = max(pair.a.shape[0] for pair in adapted)
        request = _Request(pairs, widths, in_features, self._size, rank)
        self._requests.append(request)
        self._size += -(-request.size // ALIGNMENT) * ALIGNMENT
        return len(self._requests) - 1

    def build(self) -> None:
        """Allocate the flat tensors and move every parameter into them."""
        self.master = torch.zeros(self._size, dtype=torch.float32, device=self.device)
        self.grad = torch.zeros_like(self.master)
        for ticket, request in enumerate(self._requests):
            group, row = self.group(ticket), 0
            for index, (pair, width) in enumerate(zip(request.pairs, request.widths, strict=True)):
                if pair is not None:
                    rank, first = pair.a.shape[0], index * request.rank
                    self._adopt(pair.a, group.a[first : first + rank], group.grad_a[first : first + rank])
                    rows = slice(row, row + width)
                    self._adopt(pair.b, group.b[rows, :rank], group.grad_b[rows, :rank])
                row += width

    def group(self, ticket: int) -> GroupAdapter:
        """Return the views of a reserved group."""
        request = self._requests[ticket]
        middle, end = request.start + request.size_a, request.start + request.size

        def split(flat: Tensor) -> tuple[Tensor, Tensor]:
            a = flat[request.start : middle].view(-1, request.in_features)
            return a, flat[middle:end].view(-1, request.rank)

        (a, b), (grad_a, grad_b) = split(self.master), split(self.grad)
        scaling = next(pair.scaling for pair in request.pairs if pair is not None)
        return GroupAdapter(a, b, grad_a, grad_b, scaling, request.widths)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The LoRA parameters, in flat order."""
        return [slot.parameter for slot in self._slots]

    def attach_grads(self) -> None:
        """Make every parameter's gradient a view of the flat one, with the value it has (none counts as zero)."""
        first, last = self._slots[0], self._slots[-1]
        if all(slot.parameter.grad is not None and _same(slot.parameter.grad, slot.grad) for slot in (first, last)):
            return
        given = [slot.parameter.grad for slot in self._slots]
        fresh = all(grad is None for grad in given)
        if fresh:
            self.grad.zero_()
        for slot, grad in zip(self._slots, given, strict=True):
            if grad is None and not fresh:
                slot.grad.zero_()
            elif grad is not None and not _same(grad, slot.grad):
                slot.grad.copy_(grad)
            slot.parameter.grad = slot.grad

    def restore(self) -> None:
        """Give the parameters memory of their own again, in their original dtype, with the values they have now."""
        for slot in self._slots:
            slot.parameter.data = slot.parameter.data.clone(memory_format=torch.contiguous_format).to(slot.dtype)
            slot.parameter.grad = None

    def _adopt(self, parameter: nn.Parameter, master: Tensor, grad: Tensor) -> None:
        master.copy_(parameter.data)
        self._slots.append(_Slot(parameter, parameter.dtype, master, grad))
        parameter.data = master
        parameter.grad = None


def _same(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr()
