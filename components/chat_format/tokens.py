"""Token ids of a text, and where in it each token stands."""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tokens(NamedTuple):
    """Token ids, shape (T,), and the characters of the text [start, end) of each, shape (T, 2); or with `in_bytes` the
    bytes of the text in UTF-8.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    in_bytes: bool = False

    def places(self, text: str, spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Spans of characters of `text`, in order, as `offsets` count."""
        if not self.in_bytes or text.isascii():
            return spans
        edges = (0, *chain.from_iterable(spans))
        ends = list(accumulate(len(text[start:end].encode()) for start, end in pairwise(edges)))
        return list(zip(ends[::2], ends[1::2], strict=True))
