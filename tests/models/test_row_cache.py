import pytest
import torch

from finemill.models.row_cache import RowCache


def test_columns_that_no_row_has_are_given_up_before_more_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemill.models.row_cache._COLUMNS", 4)
    monkeypatch.setattr("finemill.models.row_cache._WORTH_MOVING", 2)
    keys = torch.arange(1.0, 7.0).view(2, 1, 3, 1)
    mask_BT = torch.tensor([[1, 1, 1], [0, 0, 1]])
    cache = RowCache([(keys, -keys)], 2, 3)
    cache.place([0, 1], [(keys, -keys)], mask_BT)
    cache.reserve([0, 1], 0)
    cache.advance()
    # The second row goes on alone: two columns are before it, and a prompt of two may come.
    cache.reserve([1], 2)
    assert (cache.version, cache.mask_BT.shape[1], int(cache.column)) == (0, 4, 2)
    assert cache.used([1]) == slice(0, 3)
    assert cache.layers[0][0][1, 0, 0] == 6
    cache.advance()
    cache.advance()
    cache.reserve([1], 0)
    assert (cache.version, cache.mask_BT.shape[1], int(cache.column)) == (1, 8, 4)
    cache.keep([1])
    assert (cache.version, cache.lengths_B.tolist()) == (2, [4])
