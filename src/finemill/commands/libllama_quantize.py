"""llama.cpp's own quantizer, called in a shared library of it, where there is no `llama-quantize`.

Prebuilt ones lie in packages: `libllama*.so` of npm's `@node-llama-cpp/linux-x64` (glibc 2.34), or of PyPI's
`llama-cpp-py-sync` (glibc 2.38). A program of its own, so that what it takes can be measured.
"""

import ctypes
import sys

# `llama_ftype` of llama.h.
_TYPES = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15}


class _Params(ctypes.Structure):
    """`llama_model_quantize_params`: its first two fields, and room for the others, which keep their defaults."""

    _fields_ = (("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("others", ctypes.c_uint8 * 504))


def main(library: str, source: str, target: str, type_: str, threads: str) -> int:
    """Write `source`, a GGUF file, as `target` of another type. Returns: the exit code."""
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _Params
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Params))
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_backend_init()
    params: _Params = llama.llama_model_quantize_default_params()
    params.threads, params.type = int(threads), _TYPES[type_]
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
