"""Keys and values of rows that are answered together, in memory that is taken for many columns at once.

The newest tokens of all rows share a column; a row's own columns are those that its mask names. Nothing moves while
rows grow, so that a graph of the next forward pass stays right.
"""

# B rows, T columns

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Columns that are added when none is left: a multiple of 8, as torch's kernels have masks.
_COLUMNS = 256
# Columns that no row has are given up when so many can be had: each time copies the cache.
_WORTH_MOVING = 32

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]


class RowCache:
    """The cache of B rows, empty at first.

    Args:
        like: keys and values of each layer, shape (any, heads, any, head width), for their shapes and types.
        num_rows: B.
        end: the column of the first token that is written, at least the length of every prompt.

    Attributes:
        version: another number says that the memory is another one.
        mask_BT: which columns are a row's own, bool.
        lengths_B: tokens that a row has in the cache, int64.
        column: where the next token goes, shape (1,), int64.
    """

    def __init__(self, like: Layers, num_rows: int, end: int) -> None:
        device = like[0][0].device
        self.version = 0
        columns = -(-(end + 1) // _COLUMNS) * _COLUMNS
        self.layers = [
            tuple(part.new_zeros((num_rows, part.shape[1], columns, part.shape[3])) for part in layer) for layer in like
        ]
        self.mask_BT = torch.zeros((num_rows, columns), dtype=torch.bool, device=device)
        self.lengths_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.column = torch.tensor([end], device=device)
        self._end = end
        self._starts = [end] * num_rows

    def place(self, rows: Sequence[int], layers: Layers, mask_BT: torch.Tensor) -> None:
        """Begin `rows` with prompts that have run, padded on the left, whose last tokens share a column."""
        at = torch.tensor(list(rows), device=self.mask_BT.device)
        own = slice(self._end - mask_BT.shape[1], self._end)
        for stored, new in zip(self.layers, layers, strict=True):
            for into, part in zip(stored, new, strict=True):
                into[at, :, own] = part
        self.mask_BT[at] = False
        self.mask_BT[at, own] = mask_BT.bool()
        self.lengths_B[at] = mask_BT.sum(1)
        for row, length in zip(rows, mask_BT.sum(1).tolist(), strict=True):
            self._starts[row] = self._end - length

    def reserve(self, rows: Sequence[int], longest_waiting: int) -> None:
        """Have a column for the next token of `rows`, and `longest_waiting` before it for a prompt that comes later."""
        if self._end < self.mask_BT.shape[1]:
            return
        unused = min(min(self._starts[row] for row in rows), self._end - longest_waiting)
        if unused >= _WORTH_MOVING:
            for tensor in (self.mask_BT[:, None, :, None], *(part for layer in self.layers for part in layer)):
                tensor[:, :, : self._end - unused] = tensor[:, :, unused : self._end].clone()
            self.mask_BT[:, self._end - unused :] = False
            self._starts = [max(0, start - unused) for start in self._starts]
            self._end -= unused
            self.column -= unused
            return
        self.version += 1
        self.layers = [
            tuple(torch.nn.functional.pad(part, (0, 0, 0, _COLUMNS)) for part in layer) for layer in self.layers
        ]
        self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, _COLUMNS))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with `rows` alone."""
        at = torch.tensor(list(rows), device=self.mask_BT.device)
        self.version += 1
        self.layers = [tuple(part[at] for part in layer) for layer in self.layers]
        self.mask_BT, self.lengths_B = self.mask_BT[at], self.lengths_B[at]
        self._starts = [self._starts[row] for row in rows]

    def advance(self) -> None:
        """Count the token that every row has got."""
        self.lengths_B += 1
        self.column += 1
        self._end += 1

    def used(self, rows: Sequence[int]) -> slice:
        """The columns of `rows`, the next token's included."""
        return slice(min(self._starts[row] for row in rows), self._end + 1)

    def for_model(self, columns: slice) -> Any:
        """The `past_key_values` of a forward pass of one token per row, which attends to `columns`."""
        return Cache(layers=[_Layer(keys, values, self.column, columns) for keys, values in self.layers])


class _Layer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values where they are."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor, columns: slice) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._column, self._columns = column, columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the newest token in its column. Returns: keys and values of all columns."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys[:, :, self._columns], self.values[:, :, self._columns]

    def get_seq_length(self) -> int:
        """Columns before the newest token's."""
        return len(range(*self._columns.indices(self.keys.shape[2]))) - 1
