"""Stacked NF4 matrices: each one's codes, scales and decoded values are bit for bit bitsandbytes'."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from finemill.kernels.engine.nf4_quantize import quantize_nf4, quantize_nf4_stack
from finemill.kernels.ops.launch import INTERPRETED
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack, dequantize_nf4_stack

SHAPES = [(5, 24, 128), (3, 256, 64), (2, 512, 128)]
"""The last fills whole nested blocks: a GPU quantizes all of its matrices in one call."""


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_is_quantized_and_decoded_as_bitsandbytes_does_alone(shape: tuple[int, ...], device: str) -> None:
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    weight = (torch.randn(shape) * torch.rand(shape[0], 1, 1)).to(device, dtype)
    stack = quantize_nf4_stack(weight)
    out = dequantize_nf4_stack(stack, torch.empty(shape, dtype=dtype, device=device))
    for index, matrix in enumerate(weight):
        packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
        ours = stack.matrix(index)
        assert torch.equal(ours.packed, packed.view(-1))
        assert torch.equal(ours.absmax, state.absmax)
        assert ours.nested_absmax is not None
        assert ours.offset is not None
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset.reshape(()), state.offset.reshape(()))
        assert torch.equal(out[index], dequantize_4bit(packed, state))


def test_single_quantization_is_decoded_as_bitsandbytes_does(device: str) -> None:
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    matrices = [
        quantize_4bit(torch.randn(24, 128).to(device, dtype), quant_type="nf4", compress_statistics=False)
        for _ in range(3)
    ]
    stack = NF4Stack.of(
        [
            NF4Tensor(
                packed.view(-1), state.absmax, state.code, None, None, None, (24, 128), dtype, state.blocksize, 256
            )
            for packed, state in matrices
        ]
    )
    out = dequantize_nf4_stack(stack, torch.empty(3, 24, 128, dtype=dtype, device=device))
    for index, (packed, state) in enumerate(matrices):
        assert torch.equal(out[index], dequantize_4bit(packed, state))


def test_matrices_of_several_shapes_are_not_stacked(device: str) -> None:
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    matrices = [quantize_nf4(torch.randn(n, 64).to(device, dtype)) for n in (64, 128)]
    with pytest.raises(ValueError, match="of one shape"):
        NF4Stack.of(matrices)


def test_output_of_another_size_is_refused(device: str) -> None:
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    stack = quantize_nf4_stack(torch.randn(2, 64, 64).to(device, dtype))
    with pytest.raises(ValueError, match="expected contiguous"):
        dequantize_nf4_stack(stack, torch.empty(2, 64, 32, dtype=dtype, device=device))
