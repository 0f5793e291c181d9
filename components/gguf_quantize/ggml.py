"""Rounding float32 rows to a GGML type, by llama.cpp's own code.

The `xllamacpp` wheel holds llama.cpp and exports its C function `ggml_quantize_chunk`. Where it does not, the types
that the `gguf` package computes in NumPy still work; K-quants and IQ types need the library.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from finemill.errors import StepError

Bytes = NDArray[np.uint8]
# Float32 values that one call rounds: large enough to hide the call, small enough to share a matrix among threads.
_CHUNK_VALUES = 1 << 20
_UNROUNDED = (Type.F32, Type.F16, Type.BF16)
_IN_NUMPY = (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0, Type.TQ1_0, Type.TQ2_0)


def row_bytes(type_: Type, row_length: int) -> int:
    """Bytes of one row."""
    block_size, type_size = GGML_QUANT_SIZES[type_]
    return int(row_length // block_size * type_size)


def quantize(values: NDArray[np.float32], type_: Type, num_threads: int, weights: NDArray[np.float32] | None) -> Bytes:
    """Round a matrix to `type_`.

    Args:
        values: shape (rows, row length), float32.
        weights: importance of each column, shape (row length,), float32, or None for llama.cpp's own default.
    Returns: shape (rows, bytes per row), uint8.
    Raises: StepError: only llama.cpp rounds to this type, and this machine's does not export its quantizer.
    """
    function = _ggml_quantize_chunk()
    if type_ in _UNROUNDED or (function is None and type_ in _IN_NUMPY):
        encoded = quants.quantize(values, type_)
        return np.ascontiguousarray(encoded).view(np.uint8).reshape(values.shape[0], -1)
    if function is None:
        raise StepError(f"gguf-quantize: {type_.name} needs llama.cpp's quantizer: install another xllamacpp version")
    values = np.ascontiguousarray(values)
    encoded = np.empty((values.shape[0], row_bytes(type_, values.shape[1])), dtype=np.uint8)
    step = max(1, _CHUNK_VALUES // values.shape[1])

    def encode(first_row: int) -> None:
        num_rows = min(step, values.shape[0] - first_row)
        written = function(
            int(type_), values.ctypes.data, encoded.ctypes.data, first_row * values.shape[1], num_rows, values.shape[1],
            weights.ctypes.data if weights is not None else None,
        )  # fmt: skip
        assert written == num_rows * encoded.shape[1]

    # ctypes releases the interpreter lock during the call.
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(encode, range(0, values.shape[0], step)))
    return encoded


@cache
def _ggml_quantize_chunk() -> Callable[..., int] | None:
    """`size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)` of ggml.h, if it is there."""
    try:
        from xllamacpp import xllamacpp

        function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        return None
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    found: Callable[..., int] = function
    return found
