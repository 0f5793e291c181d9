"""Repeated rows: the same content, the same text, or nearly the same text by MinHash."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from finemill.components.data_prep.clean import Record
from finemill.components.data_prep.config import DataPrepConfig
from finemill.rows.reasons import DroppedRowError

# 128 hash functions estimate a Jaccard index of 0.8 to +-0.035; 32 bands of 4 find a pair of 0.8 with 99.999999 %.
_NUM_HASHES = 128
_BAND_ROWS = 4
# The largest prime below 2^32: 32-bit hashes times 32-bit factors wrap around it often and fit in 64 bits.
_PRIME = np.uint64(2**32 - 5)
_SHINGLE_WORDS = 3


class Deduplicator:
    """Remembers the rows of all sources; the first of equal ones stays."""

    def __init__(self, config: DataPrepConfig) -> None:
        self._mode = config.dedup
        self._sources = config.source_names
        self._seen: dict[bytes | str, tuple[int, int]] = {}
        self._near = NearDuplicates(config.minhash_threshold)

    def check(self, record: Record, text: str) -> None:
        """Remember a row; `text` is its normalized text. Raises: DroppedRowError: it repeats one, which is named."""
        if self._mode == "none":
            return
        key = record.row_id if self._mode == "exact" else record.text_key
        first = self._seen.setdefault(key, (record.source, record.number))
        if first != (record.source, record.number):
            raise DroppedRowError("duplicate", self._place(first, record))
        if self._mode == "minhash" and self._near.seen(text):
            raise DroppedRowError("near_duplicate")

    def _place(self, place: tuple[int, int], record: Record) -> str:
        source, number = place
        return f"row {number}" if source == record.source else f"row {number} of {self._sources[source]}"


class NearDuplicates:
    """MinHash signatures (Broder 1997) with banded lookup (Leskovec, Mining of Massive Datasets, section 3.4)."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: dict[bytes, list[int]] = {}
        # Fixed: which rows are near-duplicates must not depend on a seed.
        generator = np.random.Generator(np.random.PCG64(0))
        self._factors = generator.integers(1, _PRIME, _NUM_HASHES, dtype=np.uint64)
        self._offsets = generator.integers(0, _PRIME, _NUM_HASHES, dtype=np.uint64)

    def seen(self, text: str) -> bool:
        """Whether a text like this one was given before; if not, it is remembered."""
        signature = self._signature(text)
        keys = [b"%d:" % band + part.tobytes() for band, part in enumerate(signature.reshape(-1, _BAND_ROWS))]
        candidates = {index for key in keys for index in self._bands.get(key, ())}
        if any(np.mean(self._signatures[index] == signature) >= self._threshold for index in candidates):
            return True
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return False

    def _signature(self, text: str) -> NDArray[np.uint32]:
        """The smallest value of every hash function over the text's word triples, shape (128,)."""
        hashes = np.fromiter(_shingle_hashes(text), dtype=np.uint64)
        values = (self._factors[:, None] * hashes + self._offsets[:, None]) % _PRIME
        minima: NDArray[np.uint32] = values.min(axis=1).astype(np.uint32)
        return minima


def _shingle_hashes(text: str) -> Iterable[int]:
    for shingle in set(_shingles(text.split())):
        yield int.from_bytes(hashlib.blake2b(shingle.encode(), digest_size=4).digest(), "big")


def _shingles(words: list[str]) -> Iterator[str]:
    for start in range(max(1, len(words) - _SHINGLE_WORDS + 1)):
        yield " ".join(words[start : start + _SHINGLE_WORDS])
