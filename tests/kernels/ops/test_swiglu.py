"""SwiGLU and its gradient against fp64, at most 1.1 times Hugging Face's error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemill.kernels.ops.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_reference,
    swiglu_forward,
    swiglu_reference,
)

SHAPES = [(3, 1), (5, 123), (1, 4096), (7, 1536)]


def make(shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    gate_up = 2 * torch.randn(shape[0], 2 * shape[1])
    gate_up[:, 0] = -30.0  # silu underflows towards zero
    gate_up[0, -1] = 50.0
    gate_up[-1, :] *= 0.0 if shape[0] > 1 else 1.0
    return gate_up.to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_accurate_as_transformers(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    gate_up = make(shape, dtype, device)
    h = swiglu_forward(pitched(gate_up), out=pitched(gate_up[:, : shape[1]]))
    assert_as_accurate(h, swiglu_reference(gate_up, upcast=False), swiglu_reference(gate_up.double()), tiny=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_as_accurate_as_autograd_of_transformers(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    gate_up = make(shape, dtype, device)
    dh = torch.randn(shape).to(device, dtype)

    def grad(gate_up: torch.Tensor, upcast: bool) -> torch.Tensor:
        gate_up = gate_up.clone().requires_grad_()
        return torch.autograd.grad(swiglu_reference(gate_up, upcast=upcast), gate_up, dh.to(gate_up.dtype))[0]

    out = swiglu_backward(pitched(dh), pitched(gate_up), out=pitched(torch.zeros_like(gate_up)))
    exact, eager = grad(gate_up.double(), upcast=True), grad(gate_up, upcast=False)
    for part in (slice(None, shape[1]), slice(shape[1], None)):
        assert_as_accurate(out[:, part], eager[:, part], exact[:, part], tiny=2e-6)


def test_backward_in_place_equals_out_of_place_and_returns_the_forward(dtype: torch.dtype, device: str) -> None:
    gate_up = make((6, 1030), dtype, device)
    dh = torch.randn(6, 1030).to(device, dtype)
    expected, h = swiglu_backward(dh, gate_up), swiglu_forward(gate_up)
    assert swiglu_backward(dh, gate_up, out=gate_up, h_out=dh) is gate_up
    assert torch.equal(gate_up, expected)
    torch.testing.assert_close(dh, h, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)


def test_public_op_differentiates_through_batch_dimensions(device: str) -> None:
    gate_up = make((6, 50), torch.float32, device).reshape(2, 3, 100).requires_grad_()
    dh = torch.randn(2, 3, 50, device=device)
    ours = torch.autograd.grad(swiglu(gate_up), gate_up, dh)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(swiglu_reference(gate_up), gate_up, dh)[0])


def test_hand_derived_gradient_passes_gradcheck() -> None:
    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(gate_up)
            return swiglu_reference(gate_up)

        @staticmethod
        def backward(ctx: Any, dh: torch.Tensor) -> torch.Tensor:
            return swiglu_backward_reference(dh, *ctx.saved_tensors)

    assert torch.autograd.gradcheck(Reference.apply, (torch.randn(3, 8, dtype=torch.float64, requires_grad=True),))


def test_wrong_inputs_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="gate columns, then up columns"):
        swiglu_forward(torch.randn(4, 7, device=device))
    with pytest.raises(ValueError, match="dh has shape"):
        swiglu_backward(torch.randn(4, 8, device=device), torch.randn(4, 8, device=device))
