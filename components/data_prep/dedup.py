"""Repeated rows: the same content, the same text, or nearly the same text by MinHash."""

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.index import Place, RowIndex
from finemill.components.data_prep.record import Record
from finemill.components.data_prep.units import runs_of, units_of
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError

# 128 hash functions estimate a Jaccard index of 0.8 to +-0.035; 32 bands of 4 find a pair of 0.8 with 99.999999 %.
_NUM_HASHES = 128
_BAND_HASHES = 4
_SHINGLE_UNITS = 3
# Fixed: which rows are near-duplicates must not depend on a seed.
_SEED = 42
# Of rows that share a band, so many are compared with all others; more are boilerplate that other bands tell apart.
_MOST_LEADERS = 64


class Deduplicator:
    """Tells which rows repeat others, of all sources; the first of equal ones stays."""

    def __init__(self, config: DataPrepConfig, index: RowIndex) -> None:
        self._mode = config.dedup
        self._sources = config.source_names
        self._index = index
        self._near = NearDuplicates(config.minhash_threshold)

    def check(self, record: Record) -> None:
        """Remember a row. Raises: DroppedRowError: it repeats one, which is named."""
        if self._mode == "none":
            return
        own = (record.source, record.number)
        first = self._index.first(record.row_id if self._mode == "exact" else record.text_key, own)
        if first != own:
            raise DroppedRowError("duplicate", self._place(first, record.source))
        if record.sketch is not None:
            self._near.add(record.sketch)

    def near_duplicates(self) -> Iterator[tuple[int, Place, str]]:
        """The index's rows that are near-duplicates: number and place of each, and what it nearly repeats."""
        found = self._near.repeats() if self._mode == "minhash" else {}
        for later, first in found.items():
            place = self._index.place_of(later)
            yield later, place, self._place(self._index.place_of(first), place[0])

    def _place(self, place: Place, own_source: int) -> str:
        source, number = place
        return f"row {number}" if source == own_source else f"row {number} of {self._sources[source]}"


def sketch_of(text: str) -> bytes:
    """A normalized text's MinHash signature: the smallest hashes of its triples of words, or of letters in scripts
    without spaces, as unsigned integers of 32 bits.

    Raises: UserError: rensa is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("dedup minhash needs rensa: pip install 'finemill[data]'") from None
    sketch = RMinHash(_NUM_HASHES, _SEED)
    sketch.update(list(runs_of(units_of(text), _SHINGLE_UNITS)))
    return array("I", sketch.digest()).tobytes()


class NearDuplicates:
    """MinHash signatures (Broder 1997) with banded lookup (Leskovec, Mining of Massive Datasets, section 3.4).

    Memory holds 512 bytes a text.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._signatures = array("I")

    def add(self, sketch: bytes) -> None:
        """Remember a text by its sketch."""
        self._signatures.frombytes(sketch)

    def repeats(self) -> dict[int, int]:
        """For each text that is nearly one before it, that one, as numbers in the order in which they were added."""
        signatures = np.frombuffer(self._signatures, dtype=np.uint32).reshape(-1, _NUM_HASHES)
        found: dict[int, int] = {}
        for band in range(0, _NUM_HASHES, _BAND_HASHES):
            for group in _groups(signatures[:, band : band + _BAND_HASHES]):
                self._compare(signatures, group, found)
        return found

    def _compare(self, signatures: NDArray[np.uint32], group: NDArray[np.int64], found: dict[int, int]) -> None:
        """Add those of a group that are nearly one before them. Texts that are found already decide nothing."""
        left = [number for number in group.tolist() if number not in found]
        for _ in range(_MOST_LEADERS):
            if len(left) < 2:
                return
            leader, others = left[0], np.array(left[1:])
            near = (signatures[others] == signatures[leader]).mean(axis=1) >= self._threshold
            found.update(dict.fromkeys(others[near].tolist(), leader))
            left = others[~near].tolist()


def _groups(band: NDArray[np.uint32]) -> Iterator[NDArray[np.int64]]:
    """Numbers of the texts that agree in a band, where there are several, each group in order."""
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in range(band.shape[1]):
        # An odd factor, so that no hash is lost; two bands that meet by chance are told apart by their signatures.
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + band[:, column]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        if end - start > 1:
            yield order[start:end]
