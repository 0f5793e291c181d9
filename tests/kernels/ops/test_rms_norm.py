"""RMSNorm, residual + RMSNorm and their gradients against fp64, at most 1.1 times Hugging Face's error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemill.kernels.ops.rms_norm import (
    add_rms_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_forward,
    rms_norm_reference,
)

EPS = 1e-6
SHAPES = [(3, 1), (5, 123), (1, 4096), (9, 1024), (4, 2560)]


def make(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with outliers and one zero row, and a weight away from one."""
    x = torch.randn(shape)
    x[:, 0] *= 100.0
    if shape[0] > 1:
        x[-1] = 0.0
    return x.to(device, dtype), (1 + 0.3 * torch.randn(shape[1])).to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_accurate_as_transformers(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    x, weight = make(shape, dtype, device)
    y, rstd = rms_norm_forward(pitched(x), weight, EPS, out=pitched(torch.zeros_like(x)))
    exact = rms_norm_reference(x.double(), weight.double(), EPS)
    assert_as_accurate(y, rms_norm_reference(x, weight, EPS, upcast=False), exact)
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(-1) + EPS).rsqrt(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_norm_is_as_accurate_as_transformers(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    x, weight = make(shape, dtype, device)
    delta = torch.randn(shape).to(device, dtype)
    total, y, rstd = add_rms_norm_forward(pitched(x), pitched(delta), weight, EPS, out=pitched(torch.zeros_like(x)))
    assert torch.equal(total, x + delta)
    exact = rms_norm_reference(total.double(), weight.double(), EPS)
    assert_as_accurate(y, rms_norm_reference(total, weight, EPS, upcast=False), exact)
    assert torch.equal(rstd, rms_norm_forward(total, weight, EPS)[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_backward_is_as_accurate_as_autograd_of_transformers(
    shape: tuple[int, int],
    residual: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    x, weight = make(shape, dtype, device)
    dy, residual_grad = (torch.randn(shape).to(device, dtype) for _ in range(2))

    def grad(x: torch.Tensor, upcast: bool) -> torch.Tensor:
        x = x.clone().requires_grad_()
        y = rms_norm_reference(x, weight.to(x.dtype), EPS, upcast=upcast)
        loss = (y * dy.to(x.dtype)).sum() + ((x * residual_grad.to(x.dtype)).sum() if residual else 0.0)
        return torch.autograd.grad(loss, x)[0]

    _, rstd = rms_norm_forward(x, weight, EPS)
    extra = pitched(residual_grad) if residual else None
    dx = rms_norm_backward(pitched(dy), pitched(x), weight, rstd, extra, out=pitched(torch.zeros_like(x)))
    assert_as_accurate(dx, grad(x, upcast=False), grad(x.double(), upcast=True), tiny=2e-6)


def test_sum_and_gradient_may_overwrite_their_inputs(dtype: torch.dtype, device: str) -> None:
    x, weight = make((6, 256), dtype, device)
    delta, dy = (torch.randn(6, 256).to(device, dtype) for _ in range(2))
    total, y, rstd = add_rms_norm_forward(x, delta, weight, EPS)
    in_place = x.clone()
    assert torch.equal(add_rms_norm_forward(in_place, delta, weight, EPS, sum_out=in_place)[1], y)
    assert torch.equal(in_place, total)
    expected = rms_norm_backward(dy, total, weight, rstd, residual_grad=delta)
    rms_norm_backward(dy, total, weight, rstd, residual_grad=delta, out=delta)
    assert torch.equal(delta, expected)


def test_public_op_differentiates_through_batch_dimensions(device: str) -> None:
    x, weight = make((12, 96), torch.float32, device)
    x = x.reshape(2, 6, 96).requires_grad_()
    dy = torch.randn(2, 6, 96, device=device)
    ours = torch.autograd.grad(rms_norm(x, weight, EPS), x, dy)[0]
    expected = torch.autograd.grad(rms_norm_reference(x, weight, EPS), x, dy)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_hand_derived_gradient_passes_gradcheck() -> None:
    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return rms_norm_reference(x, weight, EPS)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
            x, weight = ctx.saved_tensors
            rstd = (x.square().mean(-1) + EPS).rsqrt()
            return rms_norm_backward_reference(dy, x, weight, rstd), None

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(Reference.apply, (x, weight))


def test_wrong_inputs_are_refused(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm_forward(x, torch.ones(7, device=device), EPS)
    with pytest.raises(ValueError, match="must be contiguous"):
        rms_norm_forward(x.t(), torch.ones(4, device=device), EPS)
    with pytest.raises(ValueError, match="requires a gradient"):
        rms_norm(x, torch.ones(8, device=device, requires_grad=True), EPS)
