"""A base in NF4 on the disk, as bitsandbytes and transformers write it."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from finemill.artifacts.records import write_json
from finemill.models.checkpoint_files import copy_small_files, parameters
from finemill.models.nf4.encode import encoded, encoded_shapes
from finemill.models.stored_model import StoredModel
from finemill.models.write_weights import Shapes, write_model

_MAX_SHARD_SIZE = "4GB"


def checkpoint_shapes(stored: StoredModel, quantized: Collection[str], dtype: torch.dtype) -> Shapes:
    """Shape and type of every tensor of a checkpoint with the layers `quantized` in NF4, the others in `dtype`."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, name in parameters(stored):
        tensor = stored.tensors[key]
        if name.removesuffix(".weight") in quantized:
            shapes |= encoded_shapes(key, tensor.num_elements)
        else:
            shapes[key] = tensor.shape, dtype
    return shapes


def write_checkpoint(
    stored: StoredModel, quantized: Collection[str], skipped: Collection[str], dtype: torch.dtype, folder: Path
) -> None:
    """Write the model with the layers `quantized` in NF4, one weight in memory at a time, and what lies beside it.

    Args:
        skipped: `llm_int8_skip_modules`, which names the other linear layers.
    """
    write_model(
        folder, checkpoint_shapes(stored, quantized, dtype), _tensors(stored, quantized, dtype), _MAX_SHARD_SIZE
    )
    config = json.loads((stored.folder / "config.json").read_text(encoding="utf-8"))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(skipped),
    )
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | {"quantization_config": quantization.to_dict()})
    copy_small_files(stored.folder, folder)


def _tensors(stored: StoredModel, quantized: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for key, name in parameters(stored):
        values = stored.read(name)
        if name.removesuffix(".weight") in quantized:
            yield from encoded(key, values, dtype).items()
        else:
            yield key, values.to(dtype)
