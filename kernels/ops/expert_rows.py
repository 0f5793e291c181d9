"""Rows of tokens sorted by expert: where each pair of a token and one of its experts lies.

    row[t,j] = start[e] + #{pairs before (t, j) that go to the same expert e = experts[t,j]}
    start[e+1] = start[e] + ceil(pairs of e / block) block

An expert's rows begin at a multiple of `block`, so every tile of that many rows belongs to one expert: kernels need no
masks within a tile. Rows that fill up a block belong to no pair; whoever gathers writes zeros there, and every product
of them is zero. How many rows are in use is known on the device alone; `capacity` bounds it for any routing, so that
shapes do not depend on the data and a CUDA graph replays. The sort is stable: runs repeat bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finemill.kernels.ops.division import capacity

# T tokens, k experts per token, E experts, R = capacity rows


@dataclass(frozen=True)
class ExpertRows:
    """Layout of one micro-batch's rows.

    Args:
        row_pair: (R,) int32, the pair t k + j at a row, -1 where there is none.
        pair_row: (T, k) int32, the row of a pair.
        starts: (E + 1,) int32, first row of each expert, and the end of all rows in use.
        tile_expert: (R / block,) int32, the expert of each block of rows; E beyond the end.
        block: rows that belong to one expert.
    """

    row_pair: Tensor
    pair_row: Tensor
    starts: Tensor
    tile_expert: Tensor
    block: int

    @property
    def num_rows(self) -> int:
        """R."""
        return self.row_pair.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.starts.shape[0] - 1

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return the pairs' values (T, k) by row, (R,): zero where there is no pair."""
        taken = weights.reshape(-1)[self.row_pair.clamp(min=0)]
        return torch.where(self.row_pair >= 0, taken, 0.0)

    def of_pairs(self, values: Tensor) -> Tensor:
        """Return the rows' values (R,) by pair, (T, k)."""
        return values[self.pair_row]


def sort_by_expert(experts: Tensor, num_experts: int, block: int) -> ExpertRows:
    """Sort pairs by expert, without reading anything back.

    Args:
        experts: (T, k) int32.
        num_experts: E.
        block: rows of a tile; a power of two.
    """
    tokens, per_token = experts.shape
    device, pairs, rows = experts.device, experts.numel(), capacity(tokens, per_token, num_experts, block)
    keys, order = torch.sort(experts.reshape(-1), stable=True)
    edges = torch.searchsorted(keys, torch.arange(num_experts + 1, dtype=keys.dtype, device=device), out_int32=True)
    counts = edges[1:] - edges[:-1]
    starts = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    starts[1:] = torch.cumsum((counts + (block - 1)) // block * block, dim=0)
    row = (starts[:-1] - edges[:-1])[keys] + torch.arange(pairs, dtype=torch.int32, device=device)
    row_pair = torch.full((rows,), -1, dtype=torch.int32, device=device)
    row_pair[row] = order.int()
    pair_row = torch.zeros(pairs, dtype=torch.int32, device=device)
    pair_row[order] = row
    first = torch.arange(0, rows, block, dtype=torch.int32, device=device)
    tile_expert = torch.searchsorted(starts[1:], first, right=True, out_int32=True)
    return ExpertRows(row_pair, pair_row.view(tokens, per_token), starts, tile_expert, block)
