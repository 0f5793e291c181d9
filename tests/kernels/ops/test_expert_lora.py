"""Gathering, projections and adapters' gradients of experts, against fp64."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops.expert_lora import (
    expert_gradient,
    expert_gradient_reference,
    gather_project,
    gather_reference,
    project,
    project_reference,
)
from finemill.kernels.ops.expert_rows import ExpertRows

WIDTHS = [64, 136]

TOKENS, EXPERTS, RANK = 37, 5, 16
EMPTY_EXPERT = 3


def in_use(rows: ExpertRows) -> int:
    return int(rows.starts[-1])


def normal(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(device, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_gathered_rows_are_the_tokens_and_are_projected(
    rows: ExpertRows,
    width: int,
    transposed: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    end = in_use(rows)
    x = normal(TOKENS, width, device=device, dtype=dtype)
    factor = normal(EXPERTS, *((width, RANK) if transposed else (RANK, width)), device=device, dtype=dtype, scale=0.2)
    out, low = (torch.empty(rows.num_rows, size, device=device, dtype=dtype) for size in (width, RANK))
    gather_project(pitched(x), factor, rows, out, low, transposed=transposed)
    assert torch.equal(out[:end], gather_reference(x, rows)[:end])
    assert (out[:end][rows.row_pair[:end] < 0] == 0).all()
    exact = project_reference(gather_reference(x.double(), rows), factor.double(), rows, transposed=transposed)
    eager = project_reference(gather_reference(x, rows), factor, rows, transposed=transposed)
    assert_as_accurate(low[:end], eager[:end], exact[:end], tiny=2e-6)
    again = torch.empty_like(low)
    project(out, factor, rows, again, transposed=transposed)
    assert torch.equal(again[:end], low[:end])


def test_rows_are_gathered_without_a_projection(rows: ExpertRows, device: str) -> None:
    x = torch.randn(TOKENS, 24, device=device)
    out = torch.empty(rows.num_rows, 24, device=device)
    gather_project(x, None, rows, out, None)
    assert torch.equal(out[: in_use(rows)], gather_reference(x, rows)[: in_use(rows)])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("width", "rank"), [(64, 16), (136, 5)])
def test_gradients_are_added_for_each_expert_in_any_layout(
    rows: ExpertRows,
    width: int,
    rank: int,
    strided: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    x, low = (normal(rows.num_rows, size, device=device, dtype=dtype) for size in (width, RANK))
    x[rows.row_pair < 0] = 0
    if strided:  # as PEFT lays out B: (N, r E), expert fastest
        grad = torch.ones(width, rank, EXPERTS, device=device).permute(2, 1, 0)
    else:
        grad = torch.ones(EXPERTS, rank, width, device=device)
    expert_gradient(low, pitched(x), rows, grad, 2.0)
    exact = 1 + 2 * expert_gradient_reference(low.double(), x.double(), rows)[:, :rank]
    eager = 1 + 2 * expert_gradient_reference(low, x, rows)[:, :rank]
    assert_as_accurate(grad, eager, exact, tiny=2e-6)
    assert (grad[EMPTY_EXPERT] == 1).all()


def test_shapes_that_do_not_fit_are_refused(rows: ExpertRows, device: str) -> None:
    x, low = torch.zeros(rows.num_rows, 64, device=device), torch.zeros(rows.num_rows, 16, device=device)
    with pytest.raises(ValueError, match="grad is"):
        expert_gradient(low, x, rows, torch.zeros(EXPERTS, 32, 64, device=device), 1.0)
    with pytest.raises(ValueError, match="x has shape"):
        project(x[:-1], torch.zeros(EXPERTS, 16, 64, device=device), rows, low)
