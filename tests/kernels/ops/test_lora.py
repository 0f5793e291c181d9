"""LoRA under dropout and its gradients against fp64, at most 1.1 times the error of plain matrix products."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops.lora import (
    LoRADropout,
    dropout_mask_reference,
    lora_backward_a,
    lora_backward_x,
    lora_project,
)

# tokens, input width, groups, rank
SHAPES = [(1, 123, 1, 4), (70, 256, 3, 16), (130, 100, 2, 24), (33, 64, 1, 64)]


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, pitched: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    tokens, width, groups, rank = shape
    parts = {"x": torch.randn(tokens, width), "dya": torch.randn(tokens, groups * rank)}
    parts["x"][:, 0] *= 30.0
    parts["dya"][-1] = 0.0
    parts["a"] = torch.randn(groups * rank, width) / width**0.5
    return {name: pitched(part.to(device, dtype)) for name, part in parts.items()}


def dropout(device: str, p: float = 0.25, stream: int = 5) -> LoRADropout:
    return LoRADropout(p, torch.tensor([(7 << 32) + 12345], device=device), stream)


def dropped(x: torch.Tensor, spec: LoRADropout, group: int) -> torch.Tensor:
    mask = dropout_mask_reference(x.shape[0], x.shape[1], spec, group)
    return torch.where(mask, x * spec.scale, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_as_accurate_as_a_matrix_product(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    t = make(shape, dtype, device, pitched)
    tokens, _, groups, rank = shape
    spec = dropout(device)

    def product(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.cat([dropped(x, spec, g) @ part.t() for g, part in enumerate(a.chunk(groups))], dim=1)

    out = pitched(torch.zeros(tokens, groups * rank, dtype=dtype, device=device))
    assert lora_project(t["x"], t["a"], out, dropout=spec, groups=groups) is out
    assert_as_accurate(out, product(t["x"], t["a"]), product(t["x"].double(), t["a"].double()), tiny=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_is_as_accurate_as_a_matrix_product(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    t = make(shape, dtype, device, pitched)
    groups, spec = shape[2], dropout(device)

    def product(dya: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.t() @ dropped(x, spec, g) for g, part in enumerate(dya.chunk(groups, dim=1))])

    grad_a = torch.empty(t["a"].shape, device=device)
    lora_backward_a(t["dya"], t["x"], grad_a, spec, groups)
    eager, exact = product(t["dya"], t["x"]), product(t["dya"].double(), t["x"].double())
    assert_as_accurate(grad_a, eager, exact, tiny=2e-6)
    before = grad_a.clone()
    lora_backward_a(t["dya"], t["x"], grad_a, spec, groups, accumulate=True)
    assert torch.equal(grad_a, before + before)


@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient_replays_the_mask(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    t = make(shape, dtype, device, pitched)
    groups, spec = shape[2], dropout(device)

    def product(dya: torch.Tensor, a: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        for g, (left, right) in enumerate(zip(dya.chunk(groups, dim=1), a.chunk(groups), strict=True)):
            dx = dx + dropped(left @ right, spec, g)
        return dx

    dx = pitched(t["x"])
    eager = product(t["dya"], t["a"], dx)
    exact = product(t["dya"].double(), t["a"].double(), dx.double())
    assert_as_accurate(lora_backward_x(t["dya"], t["a"], dx, spec, groups), eager, exact, tiny=2e-6)


def test_masks_drop_the_asked_share_and_differ_between_groups_and_seeds(device: str) -> None:
    spec = dropout(device, p=0.1)
    masks = [dropout_mask_reference(512, 512, spec, group) for group in range(2)]
    other = dropout_mask_reference(512, 512, LoRADropout(0.1, spec.seed + 1, spec.stream))
    assert torch.equal(masks[1], dropout_mask_reference(512, 512, LoRADropout(0.1, spec.seed, spec.stream + 1)))
    for mask in (*masks, other):
        # Five standard deviations of 262,144 draws.
        assert abs((~mask).double().mean().item() - spec.threshold / 65536) < 5 * (0.1 * 0.9 / 512**2) ** 0.5
    for left, right in ((masks[0], masks[1]), (masks[0], other)):
        assert abs((~left & ~right).double().mean().item() - 0.01) < 0.002


def test_philox_gives_the_published_vector(device: str) -> None:
    """Random123's known answer for key and counter zero: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    for share in (0.2, 0.5, 0.8):
        spec = LoRADropout(share, seed)
        expected = torch.tensor([[half >= spec.threshold for half in halves]], device=device)
        assert torch.equal(dropout_mask_reference(1, 8, spec), expected)


def test_wrong_inputs_are_refused(device: str) -> None:
    x, a = torch.randn(4, 8, device=device), torch.randn(6, 8, device=device)
    spec = dropout(device)
    with pytest.raises(ValueError, match="a has shape"):
        lora_project(x, a[:, :7].contiguous(), dropout=spec)
    with pytest.raises(ValueError, match="equal in all"):
        lora_project(x, a, dropout=spec, groups=4)
    with pytest.raises(ValueError, match="it must be contiguous"):
        lora_backward_a(x[:, :2], x, torch.zeros(2, 16, device=device)[:, :8], spec)
    with pytest.raises(ValueError, match="allowed are"):
        LoRADropout(1.0, torch.zeros(1, dtype=torch.int64))
