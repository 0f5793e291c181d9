"""QK-norm + RoPE and their gradients against fp64, at most 1.1 times Hugging Face's error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemill.kernels.ops.qk_norm_rope import (
    qk_norm_rope_backward,
    qk_norm_rope_backward_reference,
    qk_norm_rope_forward,
    qk_norm_rope_reference,
)

EPS = 1e-6
# tokens, query heads, key heads, head width: Qwen3, Llama, Phi-like widths; head counts that do not fill a tile
SHAPES = [(5, 4, 2, 128), (1, 3, 1, 64), (3, 2, 2, 80), (3, 9, 3, 96), (2, 4, 1, 256)]


class Case:
    def __init__(self, shape: tuple[int, int, int, int], norm: bool, dtype: torch.dtype, device: str) -> None:
        self.tokens, self.n, self.k, self.d = shape
        qkv = torch.randn(self.tokens, (self.n + 2 * self.k) * self.d)
        qkv[:, :2] *= 50.0
        qkv[-1, : self.d] = 0.0
        self.qkv = qkv.to(device, dtype)

        def weight() -> torch.Tensor | None:
            return (1 + 0.3 * torch.randn(self.d)).to(device, dtype) if norm else None

        self.weights = (weight(), weight())
        angle = torch.arange(40)[:, None] / 10000 ** (torch.arange(self.d // 2) / (self.d // 2))
        self.cos, self.sin = (torch.cat((f(angle), f(angle)), 1).to(device, dtype) for f in (torch.cos, torch.sin))
        self.positions = torch.randint(0, 40, (self.tokens,)).to(device)
        self.heads = (self.n, self.k)

    def forward(self, qkv: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return qk_norm_rope_forward(qkv, *self.weights, self.cos, self.sin, self.positions, EPS, *self.heads, **kwargs)

    def reference(self, qkv: torch.Tensor, upcast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        heads = qkv.unflatten(1, (-1, self.d))
        cos, sin = (table[self.positions, : self.d // 2].to(qkv.dtype) for table in (self.cos, self.sin))
        q_weight, k_weight = (None if weight is None else weight.to(qkv.dtype) for weight in self.weights)
        q, k = heads[:, : self.n], heads[:, self.n : self.n + self.k]
        return (
            qk_norm_rope_reference(q, q_weight, cos, sin, EPS, upcast=upcast),
            qk_norm_rope_reference(k, k_weight, cos, sin, EPS, upcast=upcast),
        )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_accurate_as_transformers(
    shape: tuple[int, int, int, int],
    norm: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    case = Case(shape, norm, dtype, device)
    q, k, rstd = case.forward(pitched(case.qkv))
    exact, eager = case.reference(case.qkv.double(), upcast=True), case.reference(case.qkv, upcast=False)
    assert_as_accurate(q, eager[0], exact[0])
    assert_as_accurate(k, eager[1], exact[1])
    assert rstd.shape == (case.tokens, case.n + case.k if norm else 0)
    assert torch.isfinite(rstd).all()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_as_accurate_as_autograd_of_transformers(
    shape: tuple[int, int, int, int],
    norm: bool,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    case = Case(shape, norm, dtype, device)
    dq, dk, dv = (torch.randn(case.tokens, h, case.d).to(device, dtype) for h in (case.n, case.k, case.k))

    def grad(qkv: torch.Tensor, upcast: bool) -> torch.Tensor:
        qkv = qkv.clone().requires_grad_()
        q, k = case.reference(qkv, upcast)
        v = qkv.unflatten(1, (-1, case.d))[:, case.n + case.k :]
        return torch.autograd.grad((q, k, v), qkv, [g.to(qkv.dtype) for g in (dq, dk, dv)])[0]

    _, _, rstd = case.forward(case.qkv)
    # Attention returns its gradients as (heads, T, D) in memory.
    dq, dk, dv = (g.transpose(0, 1).contiguous().transpose(0, 1) for g in (dq, dk, dv))
    arguments = (*case.weights, case.cos, case.sin, case.positions, rstd, case.n, case.k)
    dqkv = qk_norm_rope_backward(dq, dk, dv, pitched(case.qkv), *arguments, out=pitched(torch.zeros_like(case.qkv)))
    assert_as_accurate(dqkv, grad(case.qkv, upcast=False), grad(case.qkv.double(), upcast=True), tiny=2e-6)

    in_place = case.qkv.clone()
    assert torch.equal(qk_norm_rope_backward(dq, dk, dv, in_place, *arguments, out=in_place), dqkv)


def test_v_columns_stay_when_no_dv_is_given(dtype: torch.dtype, device: str) -> None:
    case = Case((4, 4, 2, 64), True, dtype, device)
    out = torch.full_like(case.qkv, 3.0)
    q, k, rstd = case.forward(case.qkv)
    arguments = (*case.weights, case.cos, case.sin, case.positions, rstd, case.n, case.k)
    qk_norm_rope_backward(q, k, None, case.qkv, *arguments, out=out)
    assert (out[:, -2 * 64 :] == 3.0).all()
    assert torch.isfinite(out).all()


def test_outputs_may_be_views_of_one_buffer(dtype: torch.dtype, device: str) -> None:
    case = Case((5, 4, 2, 64), True, dtype, device)
    q, k, _ = case.forward(case.qkv)
    both = torch.empty((5, 6, 64), dtype=dtype, device=device)
    case.forward(case.qkv, out=(both[:, :4], both[:, 4:]))
    assert torch.equal(both, torch.cat((q, k), dim=1))


def test_hand_derived_gradient_passes_gradcheck() -> None:
    cos, sin = (f(torch.rand(3, 4, dtype=torch.float64)) for f in (torch.cos, torch.sin))
    weight = torch.rand(8, dtype=torch.float64)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return qk_norm_rope_reference(x, weight, cos, sin, EPS)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            rstd = (x.square().mean(-1) + EPS).rsqrt()
            return qk_norm_rope_backward_reference(dy, x, weight, cos, sin, rstd)

    assert torch.autograd.gradcheck(Reference.apply, (torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True),))


def test_wrong_inputs_are_refused(device: str) -> None:
    case = Case((4, 4, 2, 64), True, torch.float32, device)
    with pytest.raises(ValueError, match="heads of even width"):
        case.forward(case.qkv[:, :-1])
    with pytest.raises(ValueError, match="position_ids has shape"):
        qk_norm_rope_forward(case.qkv, *case.weights, case.cos, case.sin, case.positions[:-1], EPS, 4, 2)
    with pytest.raises(ValueError, match="both q_weight and k_weight"):
        qk_norm_rope_forward(case.qkv, case.weights[0], None, case.cos, case.sin, case.positions, EPS, 4, 2)
