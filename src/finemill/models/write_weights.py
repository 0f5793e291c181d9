"""A model written as safetensors files, one tensor in memory at a time.

The format: eight bytes with the header's length, the header in JSON with each tensor's type, shape and place, then the
values (https://huggingface.co/docs/safetensors). The library's own writer wants a whole file's tensors at once.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Self

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


class WeightFiles:
    """Safetensors files with their headers, and an index where there are several; values come in any order.

    Their places are holes until then, so that the files can be opened as they will be.
    """

    def __init__(self, folder: Path, shapes: Shapes, max_shard_size: str) -> None:
        shards = _shards(shapes, max_shard_size)
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        self._shapes = shapes
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[int, int]] = {}
        for name, shard in zip(names, shards, strict=True):
            file = (folder / name).open("wb", buffering=0)
            self._files.append(file)
            header = _header(shard)
            _write_all(file.fileno(), memoryview(header), 0)
            end = len(header)
            for key, shape in shard.items():
                self._places[key] = file.fileno(), end
                end += _num_bytes(*shape)
            file.truncate(end)
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": total_bytes(shapes)}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        for file in self._files:
            file.close()

    def write(self, key: str, values: torch.Tensor, first_row: int = 0) -> None:
        """Put a tensor, or some rows of it from `first_row` on, in its place; from any thread."""
        shape, dtype = self._shapes[key]
        assert values.dtype == dtype, (key, values.dtype)
        assert values.shape[1:] == shape[1:], (key, values.shape)
        assert first_row + math.prod(values.shape[:1]) <= math.prod(shape[:1]), (key, values.shape)
        file, start = self._places[key]
        start += first_row * _num_bytes(shape[1:], dtype)
        _write_all(file, values.contiguous().flatten().view(torch.uint8).numpy().data, start)


def write_model(folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_size: str) -> None:
    """Write `tensors`, which are those of `shapes`, as one file or as several with an index.

    While one is written, the next is computed: two are in memory.
    """
    left = set(shapes)
    with WeightFiles(folder, shapes, max_shard_size) as files, ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for key, tensor in tensors:
            assert tuple(tensor.shape) == shapes[key][0], (key, tensor.shape)
            left.remove(key)
            if written:
                written.result()
            written = writer.submit(files.write, key, tensor)
            del tensor
        if written:
            written.result()
    assert not left, left


def _write_all(file: int, values: memoryview, start: int) -> None:
    """One call of the system writes 2 GiB at most."""
    while values:
        written = os.pwrite(file, values, start)
        values, start = values[written:], start + written


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
