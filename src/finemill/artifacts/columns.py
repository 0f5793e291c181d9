"""Arrow columns out of Python values, by their buffers: `pyarrow.array` imports pandas, for a quarter of a second."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def to_column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of one type, or None, as a column.

    Args:
        values: texts, numbers, yes or no, or lists or arrays of token ids.
        kind: the column's type.
    """
    if kind == pa.string():
        encoded = [b"" if value is None else value.encode() for value in values]
        buffers = [_edges(encoded), pa.py_buffer(b"".join(encoded))]
        return pa.Array.from_buffers(kind, len(values), [_validity(values), *buffers])
    if kind == pa.list_(pa.int32()):
        lists = [() if value is None else value for value in values]
        arrays = [value for value in lists if isinstance(value, np.ndarray)]
        items = (
            np.concatenate(arrays, dtype=np.int32)
            if arrays and sum(map(len, lists)) == sum(map(len, arrays))
            else np.fromiter(chain.from_iterable(lists), np.int32)
        )
        children = [_numbers(items, pa.int32())]
        return pa.Array.from_buffers(kind, len(values), [_validity(values), _edges(lists)], children=children)
    if kind == pa.bool_():
        bits = pa.py_buffer(np.packbits(np.array(values, bool), bitorder="little"))
        return pa.Array.from_buffers(kind, len(values), [_validity(values), bits])
    if kind == pa.int64() and None not in values:
        return _numbers(np.array(values, np.int64), kind)
    return pa.array(values, kind)


def _numbers(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _edges(values: Sequence[Sequence[Any]]) -> pa.Buffer:
    """Where each value ends in all of them, after a zero. Raises: OverflowError: beyond 2 GiB."""
    edges = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=edges[1:])
    if edges[-1] > np.iinfo(np.int32).max:
        raise OverflowError("a batch of rows holds more than 2 GiB in one column")
    return pa.py_buffer(edges.astype(np.int32))


def _validity(values: Sequence[Any]) -> pa.Buffer | None:
    """A bit per value, zero for None; no bits where there is none."""
    there = np.fromiter((value is not None for value in values), bool, len(values))
    return None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
