"""Whether a file's tensors are the merged model's: each read back and decoded, of a stack each expert."""

from collections.abc import Mapping

import gguf
import numpy as np

from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.components.gguf_quantize.ggml import dequantize
from finemill.components.gguf_quantize.write import WrittenFile
from finemill.errors import StepError

# Norm of the error, in the tensor's: about twice what rounding costs evenly spread weights.
_TOLERANCES = {
    "F32": 0.0, "F16": 2.0**-8, "BF16": 2.0**-8, "Q8": 0.02, "Q6": 0.06, "Q5": 0.1, "Q4": 0.2, "IQ4": 0.2,
    "MXFP4": 0.25, "Q3": 0.4, "IQ3": 0.4, "Q2": 0.7, "IQ2": 0.7, "IQ1": 1.0, "TQ2": 1.2, "TQ1": 1.2,
}  # fmt: skip


def check_decoded(source: SourceModel, files: Mapping[str, WrittenFile], num_threads: int) -> dict[str, float]:
    """Compare every tensor of `files` with the merged model's, which is read once for all of them.

    Returns: the largest error by the keys of `files`, in the norm of the tensor or of the expert.
    Raises: StepError: a tensor, or one expert of a stack, is not in the file, or another one than the merged model's.
    """
    stored = {
        key: {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors} for key, file in files.items()
    }
    largest = dict.fromkeys(files, 0.0)
    for name, values in source.tensors():
        for key, tensors in stored.items():
            if name not in tensors:
                raise StepError(f"gguf-quantize: {key}: {name} is not in the file")
            largest[key] = max(largest[key], _compare(key, tensors[name], values, num_threads))
    return largest


def _compare(key: str, tensor: gguf.ReaderTensor, values: Array, num_threads: int) -> float:
    """The largest error of a part. Raises: StepError: it is beyond what its type costs."""
    parts, encoded = (values, tensor.data) if values.ndim == 3 else (values[None], tensor.data[None])
    if len(parts) != len(encoded):
        raise StepError(
            f"gguf-quantize: {key}: {tensor.name} has {len(encoded)} experts, the merged model {len(parts)}"
        )
    type_ = tensor.tensor_type
    allowed = _TOLERANCES[type_.name.partition("_")[0]]
    largest = 0.0
    for number, (part, own) in enumerate(zip(parts, encoded, strict=True)):
        rows = part.reshape(-1, part.shape[-1])
        found = dequantize(own.reshape(len(rows), -1), type_, rows.shape[-1], num_threads)
        size = float(np.linalg.norm(rows))
        error = float(np.linalg.norm(found - rows)) / size if size else float(np.abs(found).max())
        # Also of a file with NaN.
        if not error <= allowed:
            expert = f", expert {number}," if values.ndim == 3 else ""
            raise StepError(
                f"gguf-quantize: {key}: {tensor.name}{expert} differs from the merged model's by {error:.3g} of its "
                f"norm, and {type_.name} costs {allowed:g} at most"
            )
        largest = max(largest, error)
    return largest
