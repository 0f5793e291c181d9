"""A model written as safetensors files, one tensor in memory at a time.

The format: eight bytes with the header's length, the header in JSON with each tensor's type, shape and place, then the
values (https://huggingface.co/docs/safetensors). The library's own writer wants a whole file's tensors at once.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

import torch

from finemill.models.weights import DTYPES, INDEX_NAME

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def type_beside(dtype: torch.dtype) -> torch.dtype:
    """Of scales and of what is not quantized, in a file whose linear layers are: 16 bits, where `dtype` has others."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def total_bytes(shapes: Shapes) -> int:
    """Bytes of all values."""
    return sum(_num_bytes(*shape) for shape in shapes.values())


def write_model(folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: str) -> None:
    """Write `tensors`, which come in the order of `shapes`, as one file or as several with an index.

    While one is written, the next is computed: two are in memory.
    """
    shards = _shards(shapes, max_shard_size)
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
            written: Future[None] = writer.submit(_write_all, file, memoryview(_header(shard)))
            for expected, (shape, dtype) in shard.items():
                key, tensor = next(source)
                assert (key, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), (key, expected)
                written.result()
                written = writer.submit(_write_all, file, tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                del tensor
            written.result()
    # The source checks, at its end, that nothing was left out.
    assert next(source, None) is None
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total_bytes(shapes)}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_all(file: RawIOBase, values: memoryview) -> None:
    """One call of the system writes 2 GiB at most."""
    while values:
        values = values[file.write(values) or 0 :]


def _shards(shapes: Shapes, max_shard_size: str) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Tensors in files of at most that size, or of one tensor that is larger."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", max_shard_size)
    assert match
    limit = int(match[1]) * _UNITS[match[2]]
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    for key, shape in shapes.items():
        if shards[-1] and total_bytes(shards[-1]) + _num_bytes(*shape) > limit:
            shards.append({})
        shards[-1][key] = shape
    return shards


def _header(shard: Shapes) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, (shape, dtype) in shard.items():
        end = start + _num_bytes(shape, dtype)
        entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The values start at a multiple of eight, as readers that map the file expect.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
