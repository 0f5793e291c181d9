"""Quantize to NF4 with bitsandbytes' own library, called through ctypes: its codes, without its Python import."""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finemill.errors import UserError
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
"""Weights per scale, scales per nested scale: what bitsandbytes takes by default."""
LARGEST = 2**30
"""Elements quantized in one call: the library counts in 32 bits."""


@functools.cache
def _bitsandbytes_library() -> Any:
    """Load bitsandbytes' CUDA library for torch's CUDA version, or the highest packaged one below it."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "bitsandbytes is not installed: NF4 quantization is its library's", name="bitsandbytes"
        )
    wanted = int(str(torch.version.cuda).replace(".", ""))
    names = {
        int(file.stem.removeprefix("libbitsandbytes_cuda")): file
        for file in Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so")
    }
    fitting = [version for version in names if version // 10 == wanted // 10 and version <= wanted]
    if not fitting:
        raise UserError(f"bitsandbytes has CUDA libraries {sorted(names)}, none for CUDA {torch.version.cuda}")
    library = ctypes.CDLL(str(names[max(fitting)]))
    for name in ("bf16_nf4", "fp16_nf4", "fp32_nf4", "fp32"):
        getattr(library, f"cquantize_blockwise_{name}").argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int32] * 2
    return library


def nf4_codebook(device: torch.device) -> Tensor:
    """The 16 levels of NF4: QLoRA, appendix E."""
    levels = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    return torch.tensor(levels, dtype=torch.float32, device=device)


def dynamic_codebook(device: torch.device) -> Tensor:
    """The 256 levels of signed 8-bit dynamic quantization: Dettmers (arXiv 1511.04561), as bitsandbytes spaces them."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        scaled = (10 ** (exponent - 6)) * means
        levels += scaled.tolist() + (-scaled).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32).to(device)


def quantize_nf4(weight: Tensor, *, double_quant: bool = True) -> NF4Tensor:
    """Quantize a matrix (N, K) to NF4, by default with scales in 8 bits, code for code as bitsandbytes does.

    On a GPU bitsandbytes' library is called directly; on the CPU through its Python package.
    """
    if not weight.is_cuda:
        import bitsandbytes

        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=double_quant
        )
        parameter = nn.Parameter(packed, requires_grad=False)
        parameter.quant_state = state  # type: ignore[attr-defined]
        return NF4Tensor.from_bitsandbytes(parameter)
    weight = weight.contiguous()
    scales = torch.empty(-(-weight.numel() // BLOCKSIZE), dtype=torch.float32, device=weight.device)
    packed = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    _quantize(weight, scales, packed)
    n, k = weight.shape
    if not double_quant:
        codebook = nf4_codebook(weight.device)
        return NF4Tensor(packed, scales, codebook, None, None, None, (n, k), weight.dtype, BLOCKSIZE, NESTED_BLOCKSIZE)
    offset = scales.mean()
    absmax, nested_absmax = _quantize_scales(scales - offset)
    return NF4Tensor(
        packed,
        absmax,
        nf4_codebook(weight.device),
        dynamic_codebook(weight.device),
        nested_absmax,
        offset.reshape(1),
        (n, k),
        weight.dtype,
        BLOCKSIZE,
        NESTED_BLOCKSIZE,
    )


def _quantize(weight: Tensor, scales: Tensor, packed: Tensor) -> None:
    """Write codes and fp32 scales of a contiguous tensor.

    The library launches on the default stream; so does everything during loading.
    """
    library = _bitsandbytes_library()
    quantize = {
        torch.bfloat16: library.cquantize_blockwise_bf16_nf4,
        torch.float16: library.cquantize_blockwise_fp16_nf4,
        torch.float32: library.cquantize_blockwise_fp32_nf4,
    }[weight.dtype]
    quantize(None, weight.data_ptr(), scales.data_ptr(), packed.data_ptr(), BLOCKSIZE, weight.numel())


def _quantize_scales(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize scales to 8 bits. Returns: flat codes (uint8) and nested scales (fp32)."""
    count, device = centred.numel(), centred.device
    absmax = torch.empty(count, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(-(-count // NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
    code = dynamic_codebook(device)
    _bitsandbytes_library().cquantize_blockwise_fp32(
        code.data_ptr(),
        centred.data_ptr(),
        nested_absmax.data_ptr(),
        absmax.data_ptr(),
        NESTED_BLOCKSIZE,
        count,
    )
    return absmax, nested_absmax


def quantize_nf4_stack(weight: Tensor, *, double_quant: bool = True) -> NF4Stack:
    """Quantize matrices (M, N, K), each as `quantize_nf4` does, a few calls for all of them on a GPU."""
    count, n, k = weight.shape
    blocks = n * k // BLOCKSIZE
    if not double_quant or not weight.is_cuda or blocks * BLOCKSIZE != n * k or blocks % NESTED_BLOCKSIZE:
        return NF4Stack.of([quantize_nf4(matrix, double_quant=double_quant) for matrix in weight])
    step = max(1, LARGEST // (n * k))
    parts = [_quantize_some(some) for some in weight.contiguous().split(step)]
    packed, absmax, nested_absmax, offset = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    tables = nf4_codebook(weight.device), dynamic_codebook(weight.device)
    return NF4Stack(packed, absmax, *tables, nested_absmax, offset, (count, n, k), weight.dtype)


def _quantize_some(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return packed codes, 8-bit scales, nested scales and offsets of (M, N, K): no block belongs to two matrices."""
    count, size, device = weight.shape[0], weight[0].numel(), weight.device
    scales = torch.empty((count, size // BLOCKSIZE), dtype=torch.float32, device=device)
    packed = torch.empty((count, size // 2), dtype=torch.uint8, device=device)
    _quantize(weight, scales, packed)
    # Each mean by itself: a reduction over rows may add in another order.
    offset = torch.stack([row.mean() for row in scales])
    absmax, nested = _quantize_scales(scales - offset[:, None])
    return packed, absmax.view(count, -1), nested.view(count, -1), offset
