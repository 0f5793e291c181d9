"""NF4 decode is bit-equal to bitsandbytes, for every code, block size, shape and output dtype."""

import pytest
import torch

from finemill.kernels.ops.nf4 import NF4Tensor, dequantize_nf4, dequantize_nf4_reference

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantize(weight: torch.Tensor, *, nested: bool = True, blocksize: int = 64) -> NF4Tensor:
    params = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type="nf4", blocksize=blocksize
    )
    return NF4Tensor.from_bitsandbytes(params.to(weight.device))


def bitsandbytes_decode(weight: torch.Tensor, dtype: torch.dtype, *, nested: bool, blocksize: int) -> torch.Tensor:
    # One long row: bitsandbytes' CPU decode starts a new scale with each row, even in the middle of a block.
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight.to(dtype).reshape(1, -1), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )
    decoded: torch.Tensor = bitsandbytes.functional.dequantize_4bit(codes, state).reshape(weight.shape)
    return decoded


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "blocksize"), [((96, 128), 64), ((3, 64), 64), ((16, 256), 256), ((16, 512), 128)])
def test_decode_is_bit_equal_to_bitsandbytes(
    shape: tuple[int, ...], blocksize: int, nested: bool, dtype: torch.dtype, device: str
) -> None:
    weight = torch.randn(shape, device=device)
    expected = bitsandbytes_decode(weight, dtype, nested=nested, blocksize=blocksize)
    ours = dequantize_nf4(quantize(weight.to(dtype), nested=nested, blocksize=blocksize))
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 123), (5, 66), (33, 30), (1, 4096), (130, 96)])
def test_decode_of_odd_shapes_is_bit_equal_to_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    weight = torch.randn(shape, device=device)
    expected = bitsandbytes_decode(weight, dtype, nested=True, blocksize=64)
    assert torch.equal(dequantize_nf4(quantize(weight.to(dtype))), expected)


def every_code_under_every_scale(device: str) -> NF4Tensor:
    """A (256, 64) matrix: row b has nested scale code b and all sixteen NF4 codes, each in both nibbles."""
    codes = torch.arange(64, device=device) % 16
    rows = torch.stack([codes.roll(row) for row in range(256)])
    return NF4Tensor(
        packed=(rows[:, ::2] * 16 + rows[:, 1::2]).to(torch.uint8).reshape(-1),
        absmax=torch.arange(256, device=device).to(torch.uint8),
        codebook=bitsandbytes.functional.get_4bit_type("nf4", device=device),
        nested_code=bitsandbytes.functional.create_dynamic_map().to(device),
        nested_absmax=torch.tensor([0.7310147], device=device),
        offset=torch.tensor([0.03712], device=device),
        shape=(256, 64),
        dtype=torch.float32,
    )


def test_all_256_scale_codes_times_16_weight_codes_round_like_two_separate_operations(
    dtype: torch.dtype, device: str
) -> None:
    weight = every_code_under_every_scale(device)
    assert weight.nested_code is not None
    assert weight.nested_absmax is not None
    assert weight.offset is not None
    scale = weight.nested_code * weight.nested_absmax
    scale = scale + weight.offset
    codes = torch.stack([(torch.arange(64, device=device) % 16).roll(row) for row in range(256)])
    expected = (weight.codebook[codes] * scale[:, None]).to(dtype)
    out = torch.empty((256, 64), dtype=dtype, device=device)
    assert torch.equal(dequantize_nf4(weight, out), expected)
    assert torch.equal(dequantize_nf4_reference(weight, dtype), expected)


def test_decode_writes_a_pitched_view_and_nothing_beside_it(dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(40, 128, device=device)
    quantized = quantize(weight.to(dtype))
    wide = torch.full((40, 128 + 64), 7.0, dtype=dtype, device=device)
    dequantize_nf4(quantized, out=wide[:, :128])
    assert torch.equal(wide[:, :128], dequantize_nf4(quantized))
    assert (wide[:, 128:] == 7.0).all()


def test_out_of_wrong_shape_or_layout_is_refused(device: str) -> None:
    weight = quantize(torch.randn(8, 64, device=device))
    with pytest.raises(ValueError, match="expected \\(8, 64\\)"):
        dequantize_nf4(weight, torch.empty(8, 63, device=device))
    with pytest.raises(ValueError, match="must be contiguous"):
        dequantize_nf4(weight, torch.empty(64, 8, device=device).t())
    with pytest.raises(ValueError, match="NF4 decodes to"):
        dequantize_nf4(weight, torch.empty(8, 64, device=device, dtype=torch.float64))


def test_a_parameter_that_is_not_quantized_or_not_nf4_is_refused() -> None:
    with pytest.raises(ValueError, match="no quant_state"):
        NF4Tensor.from_bitsandbytes(torch.nn.Parameter(torch.zeros(2, 64)))
    fp4 = bitsandbytes.nn.Params4bit(torch.randn(2, 64), requires_grad=False, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="'fp4'"):
        NF4Tensor.from_bitsandbytes(fp4)
