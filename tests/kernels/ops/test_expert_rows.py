"""Pairs sorted by expert: every one has a row of its expert, in blocks of one expert, for any routing."""

import pytest
import torch

from finemill.kernels.ops.division import capacity, choose_block
from finemill.kernels.ops.expert_rows import sort_by_expert


@pytest.mark.parametrize("kind", ["random", "all to one", "one token"])
def test_every_pair_has_a_row_in_its_experts_blocks_and_order_is_kept(kind: str, device: str) -> None:
    tokens, per_token, experts, block = (1 if kind == "one token" else 50), 3, 7, 8
    chosen = torch.rand(tokens, experts).topk(per_token).indices.int()
    if kind == "all to one":
        chosen = torch.full((tokens, 1), 4, dtype=torch.int32)
        per_token = 1
    rows = sort_by_expert(chosen.to(device), experts, block)
    starts, row_pair = rows.starts.tolist(), rows.row_pair.tolist()
    assert rows.num_experts == experts
    assert rows.num_rows == capacity(tokens, per_token, experts, block)
    assert all(start % block == 0 for start in starts)
    assert starts[-1] <= rows.num_rows
    assert sorted(pair for pair in row_pair if pair >= 0) == list(range(tokens * per_token))
    for expert in range(experts):
        pairs = [pair for pair in row_pair[starts[expert] : starts[expert + 1]] if pair >= 0]
        assert pairs == [pair for pair in range(tokens * per_token) if chosen.view(-1)[pair] == expert]
        tiles = rows.tile_expert[starts[expert] // block : starts[expert + 1] // block]
        assert tiles.tolist() == [expert] * len(tiles)
    assert all(pair == -1 for pair in row_pair[starts[-1] :])
    assert (rows.tile_expert[starts[-1] // block :] == experts).all()
    flat = rows.row_pair.long()[rows.pair_row.view(-1).long()]
    assert flat.tolist() == list(range(tokens * per_token))


def test_no_routing_takes_more_rows_than_the_capacity() -> None:
    for tokens, per_token, experts, block in ((1, 1, 8, 4), (5, 2, 3, 16), (64, 4, 8, 8)):
        pairs = tokens * per_token
        busy = min(pairs, experts)
        worst = block * (busy - 1) + -(-(pairs - busy + 1) // block) * block
        assert worst <= capacity(tokens, per_token, experts, block) < pairs + busy * block


def test_values_go_between_pairs_and_rows(device: str) -> None:
    chosen = torch.rand(20, 6).topk(2).indices.int().to(device)
    rows, weights = sort_by_expert(chosen, 6, 16), torch.rand(20, 2, device=device)
    assert torch.equal(rows.of_pairs(rows.of_rows(weights)), weights)
    assert rows.of_rows(weights)[rows.row_pair < 0].abs().sum() == 0


def test_blocks_are_small_where_experts_have_few_rows() -> None:
    assert (choose_block(16384, 8, 128), choose_block(2048, 8, 128)) == (128, 64)
