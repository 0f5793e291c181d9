"""Decode of bitsandbytes' NF4 weights with double-quantized scales, in one pass and bit for bit.

    scale[b]  = nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + offset      (two roundings, no FMA)
    weight[e] = codebook[nibble(e)] * scale[e // blocksize]                                 rounded to the output dtype

    e is the row-major element index, b = e // blocksize its quantization block; byte i of `packed` holds element 2i in
    its high and element 2i+1 in its low nibble. Without double quantization `absmax` is the fp32 scale itself.

Shapes: packed (ceil(N*K/2),) uint8, absmax (ceil(N*K/blocksize),), codebook (16,) fp32, nested_code (256,) fp32,
weight (N, K) with any row pitch. No backward: the base is frozen. Bit-equality needs multiply and add to round one
after the other, hence `enable_fp_fusion=False`. The 16 levels are looked up in shared memory, one bank each: 4.5
instructions a weight in all, against 7 with a lookup in device memory and 25 with a tree of comparisons, where a Hopper
card has about 18 to spend at the speed of its memory.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3; bitsandbytes 0.50, `dequantize_4bit`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel

BLOCKS_PER_PROGRAM = 128
"""Quantization blocks of 64 weights per program of 4 warps: every thread decodes 64 weights."""


@dataclass(frozen=True)
class NF4Tensor:
    """A matrix in bitsandbytes' NF4 format, as plain tensors.

    Args:
        packed: two codes per byte, first element in the high nibble, flat, uint8.
        absmax: one scale per block: uint8 codes under double quantization, else fp32, flat.
        codebook: the 16 NF4 levels, fp32.
        nested_code, nested_absmax, offset: the double quantization's table (256,), block scales and mean (one element),
            fp32; all None without double quantization.
        shape: (N, K), rows and columns of the decoded matrix.
        dtype: dtype the matrix decodes to by default.
        blocksize, nested_blocksize: weights per scale, scales per nested scale; powers of two.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int = 64
    nested_blocksize: int = 256

    @classmethod
    def from_bitsandbytes(cls, weight: Any) -> "NF4Tensor":
        """Wrap the storage of a quantized `bitsandbytes.nn.Params4bit` without copying its codes.

        Raises: ValueError: the parameter is not quantized yet (it is on the CPU side of `.to(device)`) or is not NF4.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("Params4bit holds no quant_state: move it to its device first, which quantizes it")
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type is {state.quant_type!r}: only 'nf4' is decoded here")
        nested = state.state2 if state.nested else None
        n, k = state.shape
        return cls(
            packed=weight.data.contiguous().view(torch.uint8).reshape(-1),
            absmax=state.absmax if nested is not None else state.absmax.float(),
            codebook=state.code.float(),
            nested_code=None if nested is None else nested.code.float(),
            nested_absmax=None if nested is None else nested.absmax.float(),
            offset=None if nested is None else state.offset.float().reshape(1),
            shape=(int(n), int(k)),
            dtype=state.dtype,
            blocksize=int(state.blocksize),
            nested_blocksize=256 if nested is None else int(nested.blocksize),
        )


def dequantize_nf4_reference(weight: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Decode in plain PyTorch. Returns: (N, K) of `dtype` (the weight's own by default), bit-equal to bitsandbytes."""
    absmax = weight.absmax
    if weight.nested_code is not None and weight.nested_absmax is not None and weight.offset is not None:
        block = torch.arange(absmax.numel(), device=absmax.device) // weight.nested_blocksize
        absmax = weight.nested_code[absmax.long()] * weight.nested_absmax[block] + weight.offset
    n, k = weight.shape
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).reshape(-1)[: n * k]
    block = torch.arange(n * k, device=codes.device) // weight.blocksize
    return (weight.codebook[codes.long()] * absmax[block]).to(dtype or weight.dtype).reshape(n, k)


@triton.jit
def _block_scale(
    block,
    in_range,
    absmax_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    NESTED: tl.constexpr,
    SIZE: tl.constexpr,
):
    scale = tl.load(absmax_ptr + block, mask=in_range, other=0)
    if NESTED:
        nested_absmax = tl.load(nested_absmax_ptr + block // SIZE, mask=in_range, other=0.0)
        scale = tl.load(nested_code_ptr + scale) * nested_absmax + tl.load(offset_ptr)
    return scale


@triton.jit
def _decode_words(words, scale, codebook_ptr, WORDS: tl.constexpr):
    # Little-endian: code c lies in byte c // 2, the even one in the high nibble. Eight codes make a 16-byte store.
    codes = (words[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :]) & 15
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    levels = tl.gather(codebook, tl.reshape(codes, (WORDS * 8,)), 0)
    return tl.reshape(levels, (WORDS, 8)) * scale[:, None]


@triton.jit
def _dequantize_nf4_kernel(
    words_ptr,  # packed as int32: eight codes each
    absmax_ptr,
    codebook_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    out_ptr,
    out_stride,
    num_blocks,
    BLOCKS_PER_ROW: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # Two dimensions, words and codes: threads of a warp take neighbouring words and store 512 adjacent bytes together.
    WORDS: tl.constexpr = BLOCKSIZE // 8
    word = tl.program_id(0) * (BLOCKS * WORDS) + tl.arange(0, BLOCKS * WORDS)
    block = word // WORDS
    in_range = block < num_blocks
    scale = _block_scale(
        block, in_range, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, NESTED, NESTED_BLOCKSIZE
    )
    words = tl.load(words_ptr + word, mask=in_range, other=0)
    weight = _decode_words(words, scale, codebook_ptr, BLOCKS * WORDS)
    row = word // (BLOCKS_PER_ROW * WORDS)
    column = (word - row * (BLOCKS_PER_ROW * WORDS)) * 8
    # int64: a vocabulary-sized matrix passes 2**31 elements.
    out_ptrs = out_ptr + (row.to(tl.int64) * out_stride + column)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), mask=in_range[:, None])


@triton.jit
def _dequantize_nf4_any_shape_kernel(
    packed_ptr,
    absmax_ptr,
    codebook_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    out_ptr,
    out_stride,
    num_elements,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    in_range = block * BLOCKSIZE < num_elements
    scale = _block_scale(
        block, in_range, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, NESTED, NESTED_BLOCKSIZE
    )
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    in_matrix = element < num_elements
    byte = tl.load(packed_ptr + element // 2, mask=in_matrix, other=0).to(tl.int32)
    codes = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    weight = tl.load(codebook_ptr + codes) * scale[:, None]
    row = element // K
    out_ptrs = out_ptr + row * out_stride + (element - row * K)
    tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), mask=in_matrix)


def dequantize_nf4(weight: NF4Tensor, out: Tensor | None = None) -> Tensor:
    """Decode an NF4 weight in one launch, double-quantized scales included.

    Args:
        weight: the quantized matrix (N, K).
        out: (N, K) to write, bf16, fp16 or fp32, any row stride >= K, last dimension contiguous (for instance columns
            [0, K) of a wider weight); a new contiguous matrix of `weight.dtype` by default.
    Returns: `out`, bit-equal to `bitsandbytes.functional.dequantize_4bit`.
    Raises: ValueError: wrong shape, dtype or column stride of `out`.
    """
    n, k = weight.shape
    if out is None:
        out = torch.empty((n, k), dtype=weight.dtype, device=weight.packed.device)
    check_rows("out", out, (n, k))
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out is {out.dtype}: NF4 decodes to bfloat16, float16 or float32")
    if not use_kernel(out):
        return out.copy_(dequantize_nf4_reference(weight, out.dtype))
    blocks = max(1, BLOCKS_PER_PROGRAM * 64 // weight.blocksize)
    scales = (weight.absmax, weight.codebook, weight.nested_code, weight.nested_absmax, weight.offset)
    grid = (triton.cdiv(weight.absmax.numel(), blocks),)
    options = {
        "BLOCKSIZE": weight.blocksize,
        "NESTED_BLOCKSIZE": weight.nested_blocksize,
        "NESTED": weight.nested_code is not None,
        "BLOCKS": blocks,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    # No block crosses a row, and the codes can be read as words.
    if k % weight.blocksize == 0 and weight.packed.data_ptr() % 4 == 0:
        words, num_blocks, per_row = weight.packed.view(torch.int32), weight.absmax.numel(), k // weight.blocksize
        _dequantize_nf4_kernel[grid](words, *scales, out, out.stride(0), num_blocks, BLOCKS_PER_ROW=per_row, **options)
    else:
        _dequantize_nf4_any_shape_kernel[grid](weight.packed, *scales, out, out.stride(0), n * k, K=k, **options)
    return out
