"""Rounding float32 rows to a GGML type, and reading them, by llama.cpp's own code.

The `xllamacpp` wheel holds llama.cpp and exports its C functions `ggml_quantize_chunk` and `dequantize_row_*`. Where it
does not, the types that the `gguf` package computes in NumPy still work; K-quants and IQ types need the library.
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


def dequantize(encoded: Bytes, type_: Type, row_length: int, num_threads: int) -> NDArray[np.float32]:
    """The values of a matrix of `type_`, as llama.cpp reads them.

    Args:
        encoded: shape (rows, bytes per row), uint8; of F32 and F16 the values themselves.
    Returns: shape (rows, row length), float32.
    """
    function = _dequantize_row(type_)
    if function is None:
        return np.asarray(quants.dequantize(np.ascontiguousarray(encoded), type_), dtype=np.float32)
    encoded = np.ascontiguousarray(encoded)
    values = np.empty((encoded.shape[0], row_length), dtype=np.float32)
    step = max(1, _CHUNK_VALUES // row_length)

    def decode(first_row: int) -> None:
        num_rows = min(step, len(values) - first_row)
        function(
            encoded.ctypes.data + first_row * encoded.shape[1],
            values.ctypes.data + first_row * row_length * values.itemsize,
            num_rows * row_length,
        )

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(decode, range(0, len(values), step)))
    return values


@cache
def _dequantize_row(type_: Type) -> Callable[..., None] | None:
    """`void dequantize_row_q4_K(const void * x, float * y, int64_t k)` and so on of ggml-quants.h, if it is there."""
    name = type_.name.lower().replace("_k", "_K")
    library = _library()
    function = getattr(library, f"dequantize_row_{name}", None) if library and type_ not in _UNROUNDED else None
    if function is None:
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found: Callable[..., None] = function
    return found


@cache
def _ggml_quantize_chunk() -> Callable[..., int] | None:
    """`size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)` of ggml.h, if it is there."""
    function = getattr(_library(), "ggml_quantize_chunk", None)
    if function is None:
        return None
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    found: Callable[..., int] = function
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """llama.cpp, inside the `xllamacpp` wheel."""
    try:
        from xllamacpp import xllamacpp

        return ctypes.CDLL(xllamacpp.__file__)
    except (ImportError, OSError):
        return None
