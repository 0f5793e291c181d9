"""Linear layers that read one input, with their LoRA adapters, as one matrix product (LoRA by K-extension).

The members of a group (q|k|v, gate|up, or one layer alone) share their input x (T, K). With the member weights stacked
to W (N, K), the adapters' A stacked to A (R, K), B block-diagonal in Bs = scaling * B (N, R), and an optional bias b:

    xa = x A^T                                       (T, R)   skinny
    y  = [x | xa | 1] [W | Bs | b]^T                 (T, N)   one GEMM, one rounding
    dya = dy Bs                                      (T, R)   skinny, in the same read of dy as dB
    dx = [dy | dya] [W ; A]                          (T, K)   one GEMM
    dA = dya^T x,   dB_i = scaling dy_i^T xa_i       fp32, added to the flat gradient

One extended weight [[W, Bs|b], [A, 0]] of (N + P) x (K + P) serves both directions, P being R + 1 rounded up to 64 so
that rows stay aligned: 64 extra columns cost a GEMM 2 to 6 % on an H200 (12 % at K = 1024), a separate rank-R update of
y 6 to 35 % (bench/levers.md). Activations are therefore allocated with P spare columns. NF4 weights are decoded into a
scratch matrix that groups of one layout share; 16-bit weights, and NF4 ones that the plan caches, are extended once.

With LoRA dropout xa is taken from the masked x, and dx needs one more pass in place of the A rows of the GEMM.

Source: Hu et al., LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732) only changes `scaling`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.engine.adapters import GroupAdapter
from finemill.kernels.ops.division import PAD
from finemill.kernels.ops.launch import use_kernel
from finemill.kernels.ops.lora import LoRADropout, lora_backward_a, lora_backward_x, lora_project
from finemill.kernels.ops.lora_b import has_kernel, lora_backward_b
from finemill.kernels.ops.nf4 import NF4Tensor, dequantize_nf4

# T tokens, K input width, N output width of all members, R rank of all members, P spare columns

BLOCK = 1024


@dataclass
class Projection:
    """A group of linear layers over one input.

    Args:
        weights: the members' frozen weights (N_i, K), at most three.
        biases: (N_i,) or None for each member.
        adapter: the stacked LoRA of the group, or None.
        dtype: compute dtype of activations and extended weights.
        device: where it computes.
        dropout: LoRA dropout of the group in training, or None.
        scratch: returns the zero-initialized buffer, shared by groups of one `layout`, to decode into; None keeps the
            extended weight for good.
    """

    weights: list[NF4Tensor | Tensor]
    biases: list[Tensor | None]
    adapter: GroupAdapter | None
    dtype: torch.dtype
    device: torch.device
    dropout: LoRADropout | None = None
    scratch: "Callable[[Projection], Tensor] | None" = None
    cached: Tensor | None = None
    _rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Lay the members out in rows."""
        sizes = [int(weight.shape[0]) for weight in self.weights]
        self.in_features = int(self.weights[0].shape[1])
        self.out_features = sum(sizes)
        self._rows = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.rank = 0 if self.adapter is None else self.adapter.rank
        self.has_bias = any(bias is not None for bias in self.biases)
        self.extension = -(-(self.rank + self.has_bias) // 8) * 8
        self.pad = -(-self.extension // PAD) * PAD

    @property
    def extended_shape(self) -> tuple[int, int]:
        """(N + P, K + P)."""
        return self.out_features + self.pad, self.in_features + self.pad

    @property
    def layout(self) -> tuple[int, ...]:
        """What decides which elements of the extended weight are zero: groups of one layout may share scratch."""
        return (*self.extended_shape, self.rank, int(self.has_bias), *self._rows)

    def extended_input(self, tokens: int) -> Tensor:
        """Uninitialized (T, K + P): the caller fills the first K columns, `forward` the extension."""
        return torch.empty((tokens, self.in_features + self.pad), dtype=self.dtype, device=self.device)

    def extended_output(self, tokens: int) -> Tensor:
        """Uninitialized (T, N + P): outputs, later their gradient, go into the first N columns."""
        return torch.empty((tokens, self.out_features + self.pad), dtype=self.dtype, device=self.device)

    def cache_weight(self) -> None:
        """Decode and extend the weight once and keep it."""
        if self.cached is None:
            self.cached = torch.zeros(self.extended_shape, dtype=self.dtype, device=self.device)
            self._decode(self.cached)
        self.refresh()

    def views(self) -> list[Tensor]:
        """The members' weights as slices of the kept extended weight."""
        assert self.cached is not None
        rows = zip(self._rows, self._rows[1:], strict=False)
        return [self.cached[begin:end, : self.in_features] for begin, end in rows]

    def drop_cache(self) -> None:
        """Free a kept weight."""
        self.cached = None

    def refresh(self) -> None:
        """Copy the adapters into a kept weight after they changed."""
        if self.cached is not None:
            self._write_adapter(self.cached)

    def extended_weight(self) -> Tensor:
        """Return [[W, Bs|b], [A, 0]], (N + P, K + P), decoded into the shared scratch if it is not kept.

        A decoded weight is valid until another group of the same layout asks for its own.
        """
        if self.cached is not None:
            return self.cached
        if self.scratch is None:
            self.cache_weight()
            assert self.cached is not None
            return self.cached
        extended = self.scratch(self)
        self._decode(extended)
        self._write_adapter(extended)
        return extended

    def forward(self, x: Tensor, out: Tensor, weight: Tensor, xa: Tensor | None = None) -> None:
        """Compute y.

        Args:
            x: (T, K + P) extended input; its first K columns are given, the extension is written here.
            out: (T, N) to write, any row stride.
            weight: what `extended_weight` returned.
            xa: (T, R) from an earlier forward of the same input, to skip the skinny product.
        """
        n, k, rank = self.out_features, self.in_features, self.rank
        if xa is not None:
            x[:, k : k + rank].copy_(xa)
        elif rank:
            self._project(x[:, :k], weight[n : n + rank, :k], x[:, k : k + rank])
        if self.extension > rank:
            x[:, k + rank : k + self.extension].zero_()
            if self.has_bias:
                x[:, k + rank].fill_(1.0)
        end = k + self.extension
        torch.mm(x[:, :end], weight[:n, :end].t(), out=out)

    def xa(self, x: Tensor) -> Tensor:
        """Return the (T, R) columns of an extended input that the backward needs, as a copy of their own."""
        return x[:, self.in_features : self.in_features + self.rank].clone()

    def backward_output(self, dy: Tensor, xa: Tensor, weight: Tensor, *, one_pass: bool = True) -> None:
        """Do the first part of the backward: dB, and dy Bs in the extension of dy.

        Args:
            dy: (T, N + P), gradient of y in the first N columns; the extension is written here.
            xa: (T, R) from the forward.
            weight: what `extended_weight` returned.
            one_pass: whether to read dy once where there is a kernel for it; its partial sums take memory.
        """
        if self.adapter is None:
            return
        n, k, rank = self.out_features, self.in_features, self.rank
        outputs, b, dya = dy[:, :n], weight[:n, k : k + rank], dy[:, n : n + rank]
        groups = list(zip(self._rows, self._rows[1:], strict=False))
        if one_pass and has_kernel(outputs, xa, groups, self.adapter.b.shape[1]):
            lora_backward_b(outputs, xa, b, groups, dya, self.adapter.grad_b, self.adapter.scaling)
            return
        torch.mm(outputs, b, out=dya)
        self.add_grad_b(mm_fp32(outputs.t(), xa))

    def backward_weight(self, dy: Tensor, x: Tensor) -> None:
        """Do the part of the backward that reads the input x (T, K): dA."""
        if self.adapter is None:
            return
        dya = dy[:, self.out_features : self.out_features + self.rank]
        if self.dropout is None:
            self.adapter.grad_a.add_(mm_fp32(dya.t(), x))
        else:
            lora_backward_a(dya, x, self.adapter.grad_a, self.dropout, self._groups, accumulate=True)

    def backward_input(self, dy: Tensor, weight: Tensor, dx: Tensor) -> None:
        """Do the part of the backward that writes dx (T, K), from dy and its extension."""
        n, k, rank = self.out_features, self.in_features, self.rank
        if self.dropout is not None and rank:
            torch.mm(dy[:, :n], weight[:n, :k], out=dx)
            lora_backward_x(dy[:, n : n + rank], weight[n : n + rank, :k], dx, self.dropout, self._groups)
            return
        end = n + -(-rank // 8) * 8
        if end > n + rank:
            dy[:, n + rank : end].zero_()
        torch.mm(dy[:, :end], weight[:end, :k], out=dx)

    @property
    def _groups(self) -> int:
        return len(self.weights)

    def _project(self, x: Tensor, a: Tensor, out: Tensor) -> None:
        """Write x A^T, of the masked x under dropout: cuBLAS runs at copy speed, the mask needs our kernel."""
        if self.dropout is None:
            torch.mm(x, a.t(), out=out)
        else:
            lora_project(x, a, out, dropout=self.dropout, groups=self._groups)

    def add_grad_b(self, product: Tensor) -> None:
        """Add scaling times the diagonal blocks of dy^T xa, (N, R) fp32, to the gradient of the stacked B's."""
        assert self.adapter is not None
        grad, rank = self.adapter.grad_b, self.adapter.b.shape[1]
        if not use_kernel(product):
            for group, (begin, end) in enumerate(zip(self._rows, self._rows[1:], strict=False)):
                block = product[begin:end, group * rank : (group + 1) * rank]
                grad[begin:end].add_(block, alpha=self.adapter.scaling)
            return
        boundaries = [*self._rows[1:-1], self.out_features, self.out_features]
        _add_grad_b_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
            product,
            grad,
            self.adapter.scaling,
            product.stride(0),
            boundaries[0],
            boundaries[1],
            grad.numel(),
            RANK=rank,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )

    def _decode(self, extended: Tensor) -> None:
        for weight, bias, begin, end in zip(self.weights, self.biases, self._rows, self._rows[1:], strict=False):
            block = extended[begin:end, : self.in_features]
            if isinstance(weight, NF4Tensor):
                dequantize_nf4(weight, block)
            else:
                block.copy_(weight)
            if bias is not None:
                extended[begin:end, self.in_features + self.rank].copy_(bias)

    def _write_adapter(self, extended: Tensor) -> None:
        if self.adapter is None:
            return
        a, b, n, k = self.adapter.a, self.adapter.b, self.out_features, self.in_features
        rank = b.shape[1]
        if not use_kernel(extended):
            extended[n : n + self.rank, :k].copy_(a)
            for group, (begin, end) in enumerate(zip(self._rows, self._rows[1:], strict=False)):
                column = k + group * rank
                extended[begin:end, column : column + rank].copy_(b[begin:end] * self.adapter.scaling)
            return
        boundaries = [*self._rows[1:-1], n, n]
        _write_adapter_kernel[(triton.cdiv(a.numel(), BLOCK) + triton.cdiv(b.numel(), BLOCK),)](
            a,
            b,
            extended,
            extended.stride(0),
            self.adapter.scaling,
            k,
            n,
            boundaries[0],
            boundaries[1],
            a.numel(),
            b.numel(),
            RANK=rank,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit
def _write_adapter_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    out_stride,
    scaling,
    K,
    N,
    second_row,
    third_row,
    num_a,
    num_b,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first cdiv(num_a, BLOCK) programs copy A (R, K), the others scale B (N, r) into its diagonal blocks."""
    program = tl.program_id(0)
    a_programs = tl.cdiv(num_a, BLOCK)
    if program < a_programs:
        element = program * BLOCK + tl.arange(0, BLOCK)
        mask = element < num_a
        row = element // K
        value = tl.load(a_ptr + element, mask=mask, other=0.0)
        offset = (N + row).to(tl.int64) * out_stride + (element - row * K)
        tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        element = (program - a_programs) * BLOCK + tl.arange(0, BLOCK)
        mask = element < num_b
        row = element // RANK
        group = (row >= second_row).to(tl.int32) + (row >= third_row).to(tl.int32)
        value = tl.load(b_ptr + element, mask=mask, other=0.0) * scaling
        offset = row.to(tl.int64) * out_stride + K + group * RANK + (element - row * RANK)
        tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_grad_b_kernel(
    product_ptr,
    grad_ptr,
    scaling,
    product_stride,
    second_row,
    third_row,
    num_elements,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < num_elements
    row = element // RANK
    group = (row >= second_row).to(tl.int32) + (row >= third_row).to(tl.int32)
    offset = row * product_stride + group * RANK + (element - row * RANK)
    value = tl.load(grad_ptr + element, mask=mask, other=0.0)
    value += scaling * tl.load(product_ptr + offset, mask=mask, other=0.0)
    tl.store(grad_ptr + element, value, mask=mask)


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply 16-bit matrices on a GPU into fp32; the CPU multiplies in fp32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
