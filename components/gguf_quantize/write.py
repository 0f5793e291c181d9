"""One GGUF file from a model folder: metadata first, then the tensors, one at a time."""

import errno
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from finemill.components.gguf_quantize.config import Quantization, size_of
from finemill.components.gguf_quantize.convert import Array, SourceModel, add_hyperparameters
from finemill.components.gguf_quantize.ggml import quantize, row_bytes
from finemill.components.gguf_quantize.mixture import ModelShape, TensorType, tensor_type
from finemill.components.gguf_quantize.origin import add_origin
from finemill.components.gguf_quantize.vocabulary import add_vocabulary

# Values rounded at once: a whole embedding would be in memory thrice.
_CHUNK_VALUES = 1 << 24
# Half of the distance between neighbours in bfloat16, relative to them.
_BFLOAT16_STEP = 2.0**-9
_LARGEST_HALF, _SMALLEST_STEP = 65504.0, 2.0**-24


@dataclass(frozen=True)
class WrittenFile:
    """What went into a GGUF file."""

    path: Path
    size_bytes: int
    num_parameters: int
    tensor_types: Mapping[str, int]
    """Number of tensors of each GGML type."""
    fallbacks: Mapping[str, str]
    """Tensors that could not have the wanted type: name -> `Q4_K -> Q5_0`, whose rows are too short for it, or
    `F16 -> BF16`, whose values are too large or too small for it."""

    @property
    def bits_per_weight(self) -> float:
        """File size per parameter, metadata included."""
        return 8 * self.size_bytes / self.num_parameters


def size_bytes(model: SourceModel, quantization: Quantization) -> int:
    """Bytes of all tensors in a file of `quantization`."""
    return sum(
        math.prod(shape[:-1]) * row_bytes(chosen.type, shape[-1])
        for (_, shape), chosen in zip(
            model.shapes(), mixture_of(model, quantization, has_imatrix=False).values(), strict=True
        )
    )


def mixture_of(model: SourceModel, quantization: Quantization, *, has_imatrix: bool) -> dict[str, TensorType]:
    """The type of every tensor, by GGUF name, in llama.cpp's mixture of that name, or of that size."""
    shape = _shape(model, has_imatrix=has_imatrix)
    return {name: tensor_type(name, rows, size_of(quantization), shape) for name, rows in model.shapes()}


def _shape(model: SourceModel, *, has_imatrix: bool) -> ModelShape:
    heads = int(model.config["num_attention_heads"])
    shared = heads // int(model.config.get("num_key_value_heads") or heads)
    return ModelShape(model.num_layers, shared, model.ties_embeddings, has_imatrix, model.num_experts)


def _file_type(quantization: Quantization) -> gguf.LlamaFileType:
    if quantization == "F32":
        return gguf.LlamaFileType.ALL_F32
    return gguf.LlamaFileType[f"MOSTLY_{'Q2_K' if quantization == 'Q2_K_L' else size_of(quantization)}"]


@dataclass(frozen=True)
class Target:
    """A file to be written.

    `chosen_types` are types of single tensors in the place of the mixture's.
    """

    path: Path
    quantization: Quantization
    chosen_types: Mapping[str, Type] | None = None


def write_gguf(
    model: SourceModel,
    path: Path,
    quantization: Quantization,
    name: str,
    num_threads: int,
    imatrix: Mapping[str, Array] | None = None,
) -> WrittenFile:
    """Write `model` as one file, as `write_ggufs` does."""
    return write_ggufs(model, [Target(path, quantization)], name, num_threads, imatrix)[0]


def write_ggufs(
    model: SourceModel,
    targets: Sequence[Target],
    name: str,
    num_threads: int,
    imatrix: Mapping[str, Array] | None = None,
) -> list[WrittenFile]:
    """Write `model` as a file per target; each tensor is read once for all of them, and in memory alone.

    Args:
        name: the model's name in the files' metadata.
        imatrix: importance of each input channel, of a stack for each expert, by GGUF tensor name, float32; or None.
    Raises: UserError: architecture, tokenizer or tensor that llama.cpp has no counterpart for.
    """
    types = _types(model, targets, has_imatrix=imatrix is not None)
    # Closed also where they cannot be finished.
    with ExitStack() as stack:
        writers = [
            stack.enter_context(closing(gguf.GGUFWriter(target.path, gguf.MODEL_ARCH_NAMES[model.architecture])))
            for target in targets
        ]
        for writer, target, chosen in zip(writers, targets, types, strict=True):
            _begin(writer, model, target.quantization, name, chosen)
        for tensor_name, values in model.tensors():
            weights = (imatrix or {}).get(tensor_name)
            for writer, target, chosen in zip(writers, targets, types, strict=True):
                encoded = _encode(values, chosen[tensor_name].type, num_threads, weights)
                with _explained(target.path):
                    writer.write_tensor_data(encoded)
    num_parameters = sum(math.prod(shape) for _, shape in model.shapes())
    return [_written(target, chosen, num_parameters) for target, chosen in zip(targets, types, strict=True)]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """NumPy says of a full disk how many values it wrote, and no more."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _types(model: SourceModel, targets: Sequence[Target], *, has_imatrix: bool) -> list[dict[str, TensorType]]:
    """The type of every tensor in each file."""
    types = [
        mixture_of(model, target.quantization, has_imatrix=has_imatrix)
        | {tensor: TensorType(type_, type_) for tensor, type_ in (target.chosen_types or {}).items()}
        for target in targets
    ]
    halves = {tensor for chosen in types for tensor, own in chosen.items() if own.type == Type.F16}
    for tensor, values in model.tensors(halves) if halves else ():
        if holds_in_float16(values):
            continue
        for chosen in types:
            if chosen[tensor].type == Type.F16:
                chosen[tensor] = replace(chosen[tensor], type=Type.BF16)
    return types


def _begin(
    writer: gguf.GGUFWriter,
    model: SourceModel,
    quantization: Quantization,
    name: str,
    types: Mapping[str, TensorType],
) -> None:
    """Write all but the tensors' values."""
    add_hyperparameters(writer, model, name)
    add_origin(writer, model.folder)
    add_vocabulary(writer, model.folder, model.num_tokens)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(quantization))
    for tensor, shape in model.shapes():
        _declare(writer, tensor, shape, types[tensor].type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _written(target: Target, types: Mapping[str, TensorType], num_parameters: int) -> WrittenFile:
    return WrittenFile(
        target.path,
        target.path.stat().st_size,
        num_parameters,
        dict(sorted(Counter(chosen.type.name for chosen in types.values()).items())),
        {tensor: f"{chosen.wanted.name} -> {chosen.type.name}" for tensor, chosen in types.items() if chosen.fell_back},
    )


def holds_in_float16(values: Array) -> bool:
    """Whether float16 keeps every row as closely as bfloat16 would: no value too large, and not all too small."""
    values = values.reshape(-1, values.shape[-1])
    for first in range(0, len(values), rows := max(1, _CHUNK_VALUES // values.shape[-1])):
        part = values[first : first + rows]
        norms = np.sqrt(np.einsum("rc,rc->r", part, part))
        # No value is beyond its row's norm, and no error beyond half a step of the smallest numbers.
        if norms.max() <= _LARGEST_HALF and norms.min() >= _SMALLEST_STEP * part.shape[-1] ** 0.5 / _BFLOAT16_STEP:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            error = np.linalg.norm(part.astype(np.float16).astype(np.float32) - part, axis=-1)
        if not (error <= _BFLOAT16_STEP * np.linalg.norm(part, axis=-1)).all():
            return False
    return True


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], type_: Type) -> None:
    if type_ in (Type.F32, Type.F16):
        dtype = np.dtype(np.float32 if type_ == Type.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        return
    byte_shape = (*shape[:-1], row_bytes(type_, shape[-1]))
    writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), math.prod(byte_shape), raw_dtype=type_)


def _encode(values: Array, type_: Type, num_threads: int, weights: Array | None) -> np.ndarray:
    if type_ == Type.F32:
        return values
    if type_ == Type.F16:
        return values.astype(np.float16)
    if values.ndim == 3:
        experts = weights if weights is not None else [None] * len(values)
        return np.stack([quantize(part, type_, num_threads, own) for part, own in zip(values, experts, strict=True)])
    return quantize(values, type_, num_threads, weights)
