"""What padding costs, and how many sequences a pack holds."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKED_ROWS = 20_000
"""So many sequences are packed to count packs; of more, which stand in a random order, the first."""
_BATCH = 8


def packing(lengths: Sequence[int], max_length: int | None) -> dict[str, float]:
    """What padding costs: in batches of eight as they come, and in packs of the longest length, best fit first.

    Of many sequences the first twenty thousand are counted, which stand in a random order.
    """
    lengths = lengths[:PACKED_ROWS]
    if not lengths:
        return {}
    room = max(max_length or 0, *lengths)
    padded = sum(max(batch) * len(batch) for batch in (lengths[i : i + _BATCH] for i in range(0, len(lengths), _BATCH)))
    packs = num_packs(lengths, room)
    return {
        "max_length": room,
        "padding_in_batches_of_8": round(1 - sum(lengths) / padded, 4),
        "padding_packed": round(1 - sum(lengths) / (packs * room), 4),
        "sequences_per_pack": round(len(lengths) / packs, 2),
    }


def num_packs_of_all(lengths: Sequence[int] | NDArray[np.integer[Any]], room: int) -> int:
    """How many packs hold the sequences, by what the first `PACKED_ROWS` of them need."""
    counted = np.asarray(lengths[:PACKED_ROWS]).tolist()
    return math.ceil(num_packs(counted, room) * len(lengths) / len(counted))


def num_packs(lengths: Sequence[int], room: int) -> int:
    """How many packs of `room` tokens hold the sequences, each pack filled with the longest that still fits."""
    left, packs = sorted(lengths), 0
    while left:
        free, packs = room, packs + 1
        while place := bisect_right(left, free):
            free -= left.pop(place - 1)
    return packs
