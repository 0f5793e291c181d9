"""A model in FP8 on the disk, as compressed-tensors keeps it: a scale per output channel, inputs rounded per token.

Servers (vLLM, SGLang) multiply in FP8 where the card can, from Ada and Hopper on, and read half the bytes elsewhere.
"""

# N tokens, O output width, I input width of a layer

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.records import write_json
from finemill.models.checkpoint_files import copy_small_files, parameters
from finemill.models.stored_model import StoredModel
from finemill.models.write_weights import Shapes, write_model

_TYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_TYPE).max
_MAX_SHARD_SIZE = "4GB"


def checkpoint_shapes(stored: StoredModel, quantized: Collection[str], dtype: torch.dtype) -> Shapes:
    """Shape and type of every tensor of a checkpoint with the layers `quantized` in FP8, the others in `dtype`."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, name in parameters(stored):
        shape = stored.tensors[key].shape
        if name.removesuffix(".weight") in quantized:
            shapes |= {key: (shape, _TYPE), f"{key}_scale": ((shape[0], 1), dtype)}
        else:
            shapes[key] = shape, dtype
    return shapes


def write_checkpoint(stored: StoredModel, quantized: Collection[str], dtype: torch.dtype, folder: Path) -> None:
    """Write the model with the layers `quantized` in FP8, one weight in memory at a time, and what lies beside it."""
    shapes = checkpoint_shapes(stored, quantized, dtype)
    write_model(folder, shapes, _tensors(stored, quantized, dtype), _MAX_SHARD_SIZE)
    config = json.loads((stored.folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {"quantization_config": _quantization(stored, quantized)})
    copy_small_files(stored.folder, folder)


def _tensors(stored: StoredModel, quantized: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for key, name in parameters(stored):
        values = stored.read(name)
        if name.removesuffix(".weight") in quantized:
            codes, scale = encode(values, dtype)
            yield key, codes
            yield f"{key}_scale", scale
        else:
            yield key, values.to(dtype)


def encode(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scale of each row, shape (rows, 1), which is of `dtype`; a row of zeros has the scale 1."""
    largest = values.abs().amax(-1, keepdim=True) / _LARGEST
    scale = largest.where(largest > 0, 1).to(dtype)
    # Beyond its largest number the type has none but NaN.
    return (values / scale.to(values.dtype)).clamp(-_LARGEST, _LARGEST).to(_TYPE), scale


def round_trip(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a server computes with in the place of `values`, in their own type."""
    codes, scale = encode(values, dtype)
    return codes.to(values.dtype) * scale.to(values.dtype)


def rounded_model(folder: Path, quantized: Collection[str], dtype: torch.dtype) -> StoredModel:
    """The model in `folder` with the weights of the layers `quantized` in FP8."""
    return StoredModel(folder, partial(_rounded, quantized, dtype))


def _rounded(quantized: Collection[str], dtype: torch.dtype, name: str, values: torch.Tensor) -> torch.Tensor:
    return round_trip(values, dtype) if name.removesuffix(".weight") in quantized else values


@contextmanager
def rounded_inputs(model: torch.nn.Module, quantized: Collection[str]) -> Iterator[None]:
    """Inside the block the layers `quantized` get their inputs in FP8, with a scale per token."""

    def round_input(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return round_trip(inputs[0], torch.float32), *inputs[1:]

    with ExitStack() as stack:
        for name in quantized:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(round_input).remove)
        yield


def _quantization(stored: StoredModel, quantized: Collection[str]) -> dict[str, Any]:
    """`quantization_config` of config.json, as compressed-tensors spells its preset FP8_DYNAMIC."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    kept = [
        name
        for name, module in stored.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in quantized
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": kept,
    }
