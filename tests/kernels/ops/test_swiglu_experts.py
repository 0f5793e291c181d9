"""SwiGLU's gradient with routing weights, against autograd in fp64."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops.expert_rows import ExpertRows
from finemill.kernels.ops.swiglu import swiglu_reference
from finemill.kernels.ops.swiglu_experts import swiglu_experts_backward


def in_use(rows: ExpertRows) -> int:
    return int(rows.starts[-1])


def normal(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(device, dtype)


@pytest.mark.parametrize("width", [40, 1100])
def test_gradients_of_gate_up_and_weights_are_autograds(
    rows: ExpertRows,
    width: int,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    end = in_use(rows)
    gate_up = normal(rows.num_rows, 2 * width, device=device, dtype=dtype)
    dh = normal(rows.num_rows, width, device=device, dtype=dtype)
    weights = torch.rand(rows.num_rows, device=device)

    def grads(compute: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = gate_up.to(compute).requires_grad_(), weights.to(compute).requires_grad_()
        h = swiglu_reference(leaves[0], upcast=False)
        return h.detach(), *torch.autograd.grad(h * leaves[1][:, None], leaves, dh.to(compute))

    exact, eager = grads(torch.float64), grads(dtype)
    ours, h = pitched(gate_up), pitched(dh)
    d_weights = swiglu_experts_backward(h, ours, rows, weights)
    assert_as_accurate(h[:end], eager[0][:end], exact[0][:end], tiny=2e-6)
    for part in (slice(None, width), slice(width, None)):
        assert_as_accurate(ours[:end, part], eager[1][:end, part], exact[1][:end, part], tiny=2e-6)
    assert_as_accurate(d_weights[:end], eager[2][:end], exact[2][:end], tiny=2e-6)
    if device == "cuda":
        assert torch.equal(ours[end:], gate_up[end:])


def test_wrong_shapes_are_refused(rows: ExpertRows, device: str) -> None:
    dh, gate_up = torch.zeros(rows.num_rows, 8, device=device), torch.zeros(rows.num_rows, 8, device=device)
    with pytest.raises(ValueError, match="gate_up has shape"):
        swiglu_experts_backward(dh, gate_up, rows, torch.zeros(rows.num_rows, device=device))
