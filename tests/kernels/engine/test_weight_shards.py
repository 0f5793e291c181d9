"""Processes of a host read each other's part of a layer, those of another host have their own copy."""

import weakref
from typing import Any

import pytest
import torch

from finemill.errors import UserError
from finemill.kernels.engine import weight_shards
from finemill.kernels.engine.weight_shards import WeightShards

LAYERS, SIZE = 2, 1500
CPU = torch.device("cpu")


def layer_of(host: int, layer: int, size: int) -> torch.Tensor:
    return ((torch.arange(size) + 7 * layer + 100 * host) % 251).to(torch.uint8)


def join(monkeypatch: pytest.MonkeyPatch, rank: int, shards: list[WeightShards], problems: list[str | None]) -> None:
    """Connect one of four processes, two on each host, as if all did."""
    answers: list[list[Any]] = [[weight_shards._handle(one._mine) for one in shards], problems]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(weight_shards, "_exchange", lambda _: answers.pop(0))
    shards[rank].connect()


@pytest.fixture
def shards() -> list[WeightShards]:
    made = [WeightShards(rank % 2, 2) for rank in range(4)]
    for rank, one in enumerate(made):
        size = one.allocate(LAYERS, SIZE, CPU)
        for layer in range(LAYERS):
            one.put(layer, layer_of(rank // 2, layer, size))
    return made


@pytest.mark.parametrize("rank", range(4))
def test_a_layer_is_gathered_from_the_processes_of_its_host(
    rank: int, shards: list[WeightShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    join(monkeypatch, rank, shards, [None] * 4)
    for layer in range(LAYERS):
        gathered = torch.zeros(2048, dtype=torch.uint8)
        begins = []
        for begin, piece in shards[rank].pieces(layer):
            gathered[begin : begin + piece.numel()].copy_(piece)
            begins.append(begin)
        assert torch.equal(gathered, layer_of(rank // 2, layer, 2048))
        assert begins == ([0, 1024] if rank % 2 == 0 else [1024, 0])


def test_all_end_where_one_cannot_map_a_part(shards: list[WeightShards], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot be read by the others \(process 3: no such memory\); use 'ddp'"):
        join(monkeypatch, 0, shards, [None, None, None, "process 3: no such memory"])


def test_a_part_is_kept_until_all_have_unmapped_it(shards: list[WeightShards], monkeypatch: pytest.MonkeyPatch) -> None:
    join(monkeypatch, 0, shards, [None] * 4)
    others = [weakref.ref(part) for part in shards[0]._parts[1:]]
    own = weakref.ref(shards[0]._mine)
    at_barrier: list[bool] = []
    monkeypatch.setattr(
        weight_shards, "_exchange", lambda _: at_barrier.extend(part() is not None for part in (own, *others))
    )
    shards[0].close()
    assert at_barrier == [True, False]
    assert own() is None
