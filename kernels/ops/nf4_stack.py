"""Decode of a stack of NF4 matrices of one shape, such as a layer's experts, in one launch and bit for bit.

    out[m] = decode(matrix m)                         nf4.py's formula, every matrix with its own offset

bitsandbytes quantizes matrices alone, so experts that transformers keeps as one (E, N, K) parameter stay 16-bit there.
Here every expert's gate, up and down projection is quantized as the matrix that the hub's checkpoint has, and the codes
and scales of a layer lie side by side: packed (M, N K / 2) uint8, absmax (M, N K / blocksize) uint8 or fp32,
nested_absmax (M, ceil(N K / blocksize / nested_blocksize)) fp32, offset (M,) fp32. out (M, N, K), contiguous.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3; bitsandbytes 0.50, `dequantize_4bit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import use_kernel
from finemill.kernels.ops.nf4 import (
    BLOCKS_PER_PROGRAM,
    NF4Tensor,
    _block_scale,
    _decode_words,
    dequantize_nf4_reference,
)

# M matrices, N rows, K columns


@dataclass(frozen=True)
class NF4Stack:
    """Matrices in bitsandbytes' NF4 format, stacked.

    Args:
        packed, absmax, nested_absmax, offset: as in `NF4Tensor`, with the matrices as first dimension.
        codebook, nested_code: the tables, of all matrices.
        shape: (M, N, K) of the decoded stack.
        dtype, blocksize, nested_blocksize: as in `NF4Tensor`.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int, int]
    dtype: torch.dtype
    blocksize: int = 64
    nested_blocksize: int = 256

    @classmethod
    def of(cls, matrices: Sequence[NF4Tensor]) -> "NF4Stack":
        """Stack matrices that were quantized alone.

        Raises: ValueError: shapes or block sizes differ, or a block crosses a row.
        """
        first = matrices[0]
        kinds = {(m.shape, m.blocksize, m.nested_blocksize, m.nested_code is None) for m in matrices}
        if len(kinds) > 1 or first.shape[1] % first.blocksize:
            raise ValueError(
                f"matrices of one shape, rows of whole blocks, can be stacked, not {sorted(map(str, kinds))}"
            )

        def stack(name: str) -> Tensor | None:
            tensors = [getattr(matrix, name) for matrix in matrices]
            return None if tensors[0] is None else torch.stack([tensor.reshape(-1) for tensor in tensors])

        offset, packed, absmax = stack("offset"), stack("packed"), stack("absmax")
        assert packed is not None
        assert absmax is not None
        return cls(
            packed,
            absmax,
            first.codebook,
            first.nested_code,
            stack("nested_absmax"),
            None if offset is None else offset.reshape(-1),
            (len(matrices), *first.shape),
            first.dtype,
            first.blocksize,
            first.nested_blocksize,
        )

    def matrix(self, index: int) -> NF4Tensor:
        """Return one matrix, as views."""
        return NF4Tensor(
            self.packed[index],
            self.absmax[index],
            self.codebook,
            self.nested_code,
            None if self.nested_absmax is None else self.nested_absmax[index],
            None if self.offset is None else self.offset[index : index + 1],
            self.shape[1:],
            self.dtype,
            self.blocksize,
            self.nested_blocksize,
        )


@triton.jit
def _dequantize_nf4_stack_kernel(
    words_ptr,  # packed as int32: eight codes each
    absmax_ptr,
    codebook_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    out_ptr,
    num_blocks,  # of one matrix
    num_nested,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCKSIZE // 8
    matrix = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * (BLOCKS * WORDS) + tl.arange(0, BLOCKS * WORDS)
    block = word // WORDS
    in_range = block < num_blocks
    absmax_ptr += matrix * num_blocks
    if NESTED:  # both are None otherwise
        nested_absmax_ptr += matrix * num_nested
        offset_ptr += matrix
    scale = _block_scale(
        block, in_range, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, NESTED, NESTED_BLOCKSIZE
    )
    words = tl.load(words_ptr + matrix * num_blocks * WORDS + word, mask=in_range, other=0)
    weight = _decode_words(words, scale, codebook_ptr, BLOCKS * WORDS)
    out_ptrs = out_ptr + matrix * num_blocks * BLOCKSIZE + (word * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), mask=in_range[:, None])


def dequantize_nf4_stack(stack: NF4Stack, out: Tensor) -> Tensor:
    """Decode all matrices of a stack in one launch.

    Args:
        stack: M matrices (N, K).
        out: M N K elements, contiguous, bf16, fp16 or fp32.
    Returns: `out`, bit-equal to `bitsandbytes.functional.dequantize_4bit` of every matrix.
    Raises: ValueError: wrong size, dtype or strides of `out`.
    """
    count, n, k = stack.shape
    if out.numel() != count * n * k or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}, strides {out.stride()}: expected contiguous {stack.shape}")
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out is {out.dtype}: NF4 decodes to bfloat16, float16 or float32")
    if not use_kernel(out):
        matrices = out.view(count, n, k)
        for index in range(count):
            matrices[index].copy_(dequantize_nf4_reference(stack.matrix(index), out.dtype))
        return out
    blocks = max(1, BLOCKS_PER_PROGRAM * 64 // stack.blocksize)
    per_matrix = n * k // stack.blocksize
    _dequantize_nf4_stack_kernel[(triton.cdiv(per_matrix, blocks), count)](
        stack.packed.view(torch.int32),
        stack.absmax,
        stack.codebook,
        stack.nested_code,
        stack.nested_absmax,
        stack.offset,
        out,
        per_matrix,
        0 if stack.nested_absmax is None else stack.nested_absmax.shape[1],
        BLOCKSIZE=stack.blocksize,
        NESTED_BLOCKSIZE=stack.nested_blocksize,
        NESTED=stack.nested_code is not None,
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
