"""Flat AdamW against fp64 and torch.optim, 8-bit state on bitsandbytes' map, gradient norm without surprises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemill.kernels.ops.adamw import (
    AdamWState,
    adamw_reference,
    adamw_step,
    dequantize_reference,
    dynamic_map,
    grad_norm,
    quantize_reference,
)

HYPER: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def scalar(value: float, device: str) -> torch.Tensor:
    return torch.tensor([value], device=device)


def run(steps: int, n: int, device: str, bits: int, **kwargs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    param, state = torch.randn(n).to(device), AdamWState.zeros(n, device, bits)
    start, grads = param.clone(), [0.1 * torch.randn(n).to(device) for _ in range(steps)]
    for step, grad in enumerate(grads, start=1):
        adamw_step(param, grad, state, step=scalar(step, device), lr=scalar(1e-2, device), **HYPER, **kwargs)
    return param, [start, *grads]


@pytest.mark.parametrize("n", [1, 123, 4096])
def test_steps_follow_torch_adamw(n: int, device: str) -> None:
    param, (start, *grads) = run(5, n, device, bits=32)
    expected = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([expected], lr=1e-2, **HYPER)
    for grad in grads:
        expected.grad = grad
        optimizer.step()
    torch.testing.assert_close(param, expected.detach(), rtol=2e-6, atol=2e-7)


def test_a_step_is_as_accurate_as_torch_against_fp64(device: str, assert_as_accurate: Callable[..., None]) -> None:
    for step in (1, 2, 1000):
        param, grad, exp_avg = (torch.randn(1000).to(device) for _ in range(3))
        exp_avg_sq = torch.rand(1000).to(device)
        arguments: dict[str, Any] = {"step": step, "lr": 1e-2, **HYPER}
        wide = (param.double(), grad.double(), exp_avg.double(), exp_avg_sq.double())
        exact = adamw_reference(*wide, **arguments)
        eager = adamw_reference(param, grad, exp_avg, exp_avg_sq, **arguments)
        state = AdamWState(exp_avg, exp_avg_sq)
        adamw_step(param, grad, state, step=scalar(step, device), lr=scalar(1e-2, device), **HYPER)
        for ours, theirs, right in zip((param, exp_avg, exp_avg_sq), eager, exact, strict=True):
            assert_as_accurate(ours, theirs, right, tiny=2e-7)


def test_clipping_and_integer_steps(device: str) -> None:
    n = 600
    param, grad = torch.randn(n).to(device), torch.randn(n).to(device)
    expected, exp_avg, _ = adamw_reference(
        param, grad, torch.zeros_like(param), torch.zeros_like(param), step=1, lr=1e-2, **HYPER, clip=0.5 / grad.norm()
    )
    state = AdamWState.zeros(n, device)
    step = torch.ones(1, dtype=torch.int64, device=device)
    adamw_step(
        param, grad, state, step=step, lr=scalar(1e-2, device), **HYPER,
        grad_norm=grad_norm(grad), max_norm=0.5,
    )  # fmt: skip
    torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.exp_avg, exp_avg, rtol=1e-5, atol=1e-7)


def test_maps_equal_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("n", [1, 123, 1500])
def test_eight_bit_state_takes_the_nearest_level(n: int, device: str) -> None:
    param, state = torch.randn(n).to(device), AdamWState.zeros(n, device, bits=8)
    grad = (torch.randn(n) * 10 ** (-5 * torch.rand(n))).to(device)  # five decades inside a block
    grad[n // 2] = 0.0
    exact = adamw_reference(param, grad, torch.zeros_like(param), torch.zeros_like(param), step=1, lr=1e-2, **HYPER)
    adamw_step(param, grad, state, step=scalar(1, device), lr=scalar(1e-2, device), **HYPER)
    torch.testing.assert_close(param, exact[0], rtol=1e-6, atol=1e-6)
    for codes, absmax, levels, moment in (
        (state.exp_avg, state.exp_avg_absmax, state.signed_map, exact[1]),
        (state.exp_avg_sq, state.exp_avg_sq_absmax, state.unsigned_map, exact[2]),
    ):
        assert absmax is not None
        assert levels is not None
        nearest_codes, nearest_absmax = quantize_reference(moment, levels)
        torch.testing.assert_close(absmax, nearest_absmax, rtol=1e-6, atol=0.0)
        # Equal, or the other neighbour of a value that lies midway up to rounding.
        error = (dequantize_reference(codes, absmax, levels) - moment).abs()
        best = (dequantize_reference(nearest_codes, nearest_absmax, levels) - moment).abs()
        torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-6 * moment.abs().max().item())
        assert (codes != nearest_codes).sum() <= max(1, n // 100)
        positive = moment > 0
        assert (dequantize_reference(codes, absmax, levels)[positive & (levels[0] == 0)] > 0).all()


def test_eight_bit_training_stays_near_fp32_training(device: str) -> None:
    """Ten steps on a quadratic from one start: the same descent up to a few percent."""
    target = torch.randn(1000).to(device)
    losses = {}
    for bits in (32, 8):
        param, state = torch.zeros(1000, device=device), AdamWState.zeros(1000, device, bits)
        for step in range(1, 11):
            grad = param - target
            adamw_step(param, grad, state, step=scalar(step, device), lr=scalar(0.05, device))
        losses[bits] = (param - target).square().mean().item()
    assert losses[8] == pytest.approx(losses[32], rel=0.03)


@pytest.mark.parametrize("n", [1, 123, 5000, 70000])
def test_grad_norm_is_the_norm(n: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemill.kernels.ops.adamw.NORM_PROGRAMS", 16)  # so that ranges of several blocks occur
    grad = torch.randn(n).to(device, dtype)
    norm = grad_norm(grad)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), grad.double().norm(), rtol=1e-6, atol=0.0)
    assert torch.equal(norm, grad_norm(grad))


def test_wrong_inputs_are_refused(device: str) -> None:
    param, state = torch.zeros(8, device=device), AdamWState.zeros(8, device)
    step, lr = scalar(1, device), scalar(1e-3, device)
    with pytest.raises(ValueError, match="grad has shape"):
        adamw_step(param, torch.zeros(7, device=device), state, step=step, lr=lr)
    with pytest.raises(ValueError, match="both grad_norm and max_norm"):
        adamw_step(param, param, state, step=step, lr=lr, max_norm=1.0)
    with pytest.raises(ValueError, match="allowed are 8 and 32"):
        AdamWState.zeros(8, device, bits=4)
