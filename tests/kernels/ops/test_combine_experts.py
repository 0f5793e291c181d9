"""A token's rows added up, weighted or not, against fp64."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops.combine_experts import combine_experts, combine_experts_reference
from finemill.kernels.ops.expert_rows import ExpertRows

TOKENS, PER_TOKEN = 37, 2


def in_use(rows: ExpertRows) -> int:
    return int(rows.starts[-1])


def normal(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(device, dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [40, 1100])
def test_sum_of_a_tokens_rows_is_as_accurate_as_eager(
    rows: ExpertRows,
    width: int,
    weighted: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    y = normal(rows.num_rows, width, device=device, dtype=dtype)
    y[in_use(rows) :] = float("nan")
    weights = torch.rand(TOKENS, PER_TOKEN, device=device) if weighted else None
    out = pitched(torch.zeros(TOKENS, width, device=device, dtype=dtype))
    combine_experts(pitched(y), rows, out, weights)
    taken = y[rows.pair_row]
    eager = (taken if weights is None else taken * weights.to(dtype)[..., None]).sum(dim=1)
    assert_as_accurate(out, eager, combine_experts_reference(y.double(), rows, weights), tiny=2e-6)


def test_wrong_shapes_are_refused(rows: ExpertRows, device: str) -> None:
    with pytest.raises(ValueError, match="out has shape"):
        combine_experts(torch.zeros(rows.num_rows, 8, device=device), rows, torch.zeros(3, 8, device=device))
