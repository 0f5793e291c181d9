"""Products by expert with LoRA in the sum, against fp64, at most 1.1 times the error of separate products."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops.expert_rows import ExpertRows, sort_by_expert
from finemill.kernels.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference

EXPERTS, RANK = 5, 16


def in_use(rows: ExpertRows) -> int:
    return int(rows.starts[-1])


def normal(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(device, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (40, 72), (8, 136)])
def test_rows_times_their_experts_matrix_is_as_accurate_as_eager_products(
    rows: ExpertRows,
    n: int,
    k: int,
    adapted: bool,
    transposed: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    inputs, outputs = (n, k) if transposed else (k, n)
    x = normal(rows.num_rows, inputs, device=device, dtype=dtype)
    weight = normal(EXPERTS, n, k, device=device, dtype=dtype, scale=0.2)
    low = factor = None
    if adapted:
        low = normal(rows.num_rows, RANK, device=device, dtype=dtype)
        shape = (RANK, k) if transposed else (n, RANK)
        factor = normal(EXPERTS, *shape, device=device, dtype=dtype, scale=0.2)
    out = pitched(torch.zeros(rows.num_rows, outputs, device=device, dtype=dtype))
    grouped_gemm(pitched(x), weight, rows, out, low, factor, transposed=transposed)
    end = in_use(rows)
    exact = grouped_gemm_reference(
        x.double(),
        weight.double(),
        rows,
        *(None if t is None else t.double() for t in (low, factor)),
        transposed=transposed,
    )
    eager = grouped_gemm_reference(x, weight, rows, transposed=transposed)
    if low is not None and factor is not None:  # a product of its own, rounded, and a sum, rounded
        eager = eager + grouped_gemm_reference(low, factor, rows, transposed=transposed)
    assert_as_accurate(out[:end], eager[:end], exact[:end], tiny=2e-6)


def test_rows_not_in_use_are_left_alone(rows: ExpertRows, device: str) -> None:
    dtype = torch.float16
    x, weight = (
        normal(rows.num_rows, 64, device=device, dtype=dtype),
        normal(EXPERTS, 32, 64, device=device, dtype=dtype),
    )
    x[in_use(rows) :] = float("nan")
    out = torch.full((rows.num_rows, 32), 7.0, device=device, dtype=dtype)
    grouped_gemm(x, weight, rows, out)
    assert torch.isfinite(out[: in_use(rows)]).all()
    if device == "cuda":
        assert (out[in_use(rows) :] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_real_widths_equal_the_reference_and_repeat_bit_for_bit(block: int, transposed: bool) -> None:
    dtype, experts = torch.bfloat16, 16
    chosen = torch.rand(1000, experts, device="cuda").topk(4).indices.int()
    rows = sort_by_expert(chosen, experts, block)
    n, k = 1536, 2048
    x = torch.randn(rows.num_rows, n if transposed else k, device="cuda").to(dtype)
    weight = torch.randn(experts, n, k, device="cuda").to(dtype) / 40
    low = torch.randn(rows.num_rows, RANK, device="cuda").to(dtype)
    factor = torch.randn(experts, *((RANK, k) if transposed else (n, RANK)), device="cuda").to(dtype)
    outs = [
        grouped_gemm(
            x,
            weight,
            rows,
            torch.full((rows.num_rows, k if transposed else n), float("nan"), device="cuda", dtype=dtype),
            low,
            factor,
            transposed=transposed,
        )
        for _ in range(2)
    ]
    end = in_use(rows)
    expected = grouped_gemm_reference(
        x.double(), weight.double(), rows, low.double(), factor.double(), transposed=transposed
    )
    error = (outs[0][:end].double() - expected[:end]).norm() / expected[:end].norm()
    assert error < 3e-3
    assert torch.equal(outs[0][:end], outs[1][:end])


def test_shapes_that_do_not_fit_are_refused(rows: ExpertRows, device: str) -> None:
    x, out = torch.zeros(rows.num_rows, 64, device=device), torch.zeros(rows.num_rows, 32, device=device)
    with pytest.raises(ValueError, match="weight is"):
        grouped_gemm(x, torch.zeros(EXPERTS, 64, 32, device=device), rows, out)
    low, factor = torch.zeros(rows.num_rows, 8, device=device), torch.zeros(EXPERTS, 32, 8, device=device)
    with pytest.raises(ValueError, match="factor is"):
        grouped_gemm(x, torch.zeros(EXPERTS, 32, 64, device=device), rows, out, low, factor)
