"""LoRA's skinny products and gradients against fp64, at most 1.1 times the error of plain matrix products."""

import pytest
import torch

from finemill.kernels.lora import (
    LoRADropout,
    dropout_mask_reference,
    lora_backward_a,
    lora_backward_b,
    lora_backward_x,
    lora_project,
)

# tokens, input width, member widths, rank
SHAPES = [(1, 123, (40,), 4), (70, 256, (300, 64, 64), 16), (130, 100, (96, 96), 24), (33, 64, (130,), 64)]


def make(shape: tuple, dtype: torch.dtype, device: str, pitched) -> dict[str, torch.Tensor]:
    tokens, width, widths, rank = shape
    groups, n = len(widths), sum(widths)
    x, dy = torch.randn(tokens, width), torch.randn(tokens, n)
    x[:, 0] *= 30.0
    dy[-1] = 0.0
    b = torch.full((n, groups * rank), float("nan"))  # off the diagonal blocks nothing is read
    for group, rows in enumerate(torch.arange(n).split(widths)):
        b[rows, group * rank : (group + 1) * rank] = 0.1 * torch.randn(len(rows), rank)
    parts = {"x": x, "dy": dy, "b": b, "a": torch.randn(groups * rank, width) / width**0.5}
    parts |= {"xa": torch.randn(tokens, groups * rank), "dya": torch.randn(tokens, groups * rank)}
    return {name: pitched(part.to(device, dtype)) for name, part in parts.items()}


def dropout(device: str, p: float = 0.25, stream: int = 5) -> LoRADropout:
    return LoRADropout(p, torch.tensor([(7 << 32) + 12345], device=device), stream)


def dropped(x: torch.Tensor, spec: LoRADropout | None, group: int) -> torch.Tensor:
    if spec is None:
        return x
    mask = dropout_mask_reference(*x.shape, spec, group)
    return torch.where(mask, x * spec.scale, 0.0)


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_as_accurate_as_a_matrix_product(shape, with_dropout, dtype, device, assert_as_accurate, pitched):
    t = make(shape, dtype, device, pitched)
    groups, spec = len(shape[2]), dropout(device) if with_dropout else None

    def product(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return 1.5 * torch.cat([dropped(x, spec, g) @ part.t() for g, part in enumerate(a.chunk(groups))], dim=1)

    out = pitched(torch.zeros(shape[0], groups * shape[3], dtype=dtype, device=device))
    assert lora_project(t["x"], t["a"], out, scale=1.5, dropout=spec, groups=groups) is out
    assert_as_accurate(out, product(t["x"], t["a"]), product(t["x"].double(), t["a"].double()), tiny=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_b_and_product_are_as_accurate_as_matrix_products(
    shape, dtype, device, assert_as_accurate, pitched
):
    t = make(shape, dtype, device, pitched)
    _, _, widths, rank = shape

    def products(dy: torch.Tensor, xa: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dya, db = [], []
        for group, (part, rows) in enumerate(zip(dy.split(widths, dim=1), b.split(widths), strict=True)):
            columns = slice(group * rank, (group + 1) * rank)
            dya.append(part @ rows[:, columns])
            db.append(2.0 * part.t() @ xa[:, columns])
        return torch.cat(dya, dim=1), torch.cat(db)

    grad_b = torch.empty(sum(widths), rank, device=device)
    dya = lora_backward_b(t["dy"], t["xa"], t["b"], grad_b, widths, scale=2.0)
    names = ("dy", "xa", "b")
    eager, exact = products(*(t[n] for n in names)), products(*(t[n].double() for n in names))
    assert_as_accurate(dya, eager[0], exact[0], tiny=2e-6)
    assert_as_accurate(grad_b, eager[1], exact[1], tiny=2e-6)

    before = grad_b.clone()
    lora_backward_b(t["dy"], t["xa"], t["b"], grad_b, widths, scale=2.0, accumulate=True)
    assert torch.equal(grad_b, before + before)


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_is_as_accurate_as_a_matrix_product(
    shape, with_dropout, dtype, device, assert_as_accurate, pitched
):
    t = make(shape, dtype, device, pitched)
    groups, spec = len(shape[2]), dropout(device) if with_dropout else None

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
def test_input_gradient_replays_the_mask(shape, dtype, device, assert_as_accurate, pitched):
    t = make(shape, dtype, device, pitched)
    groups, spec = len(shape[2]), dropout(device)

    def product(dya: torch.Tensor, a: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        for g, (left, right) in enumerate(zip(dya.chunk(groups, dim=1), a.chunk(groups), strict=True)):
            dx = dx + dropped(left @ right, spec, g)
        return dx

    dx = pitched(t["x"])
    eager = product(t["dya"], t["a"], dx)
    exact = product(t["dya"].double(), t["a"].double(), dx.double())
    assert_as_accurate(lora_backward_x(t["dya"], t["a"], dx, spec, groups), eager, exact, tiny=2e-6)


def test_masks_drop_the_asked_share_and_differ_between_groups_and_seeds(device):
    spec = dropout(device, p=0.1)
    masks = [dropout_mask_reference(512, 512, spec, group) for group in range(2)]
    other = dropout_mask_reference(512, 512, LoRADropout(0.1, spec.seed + 1, spec.stream))
    assert torch.equal(masks[1], dropout_mask_reference(512, 512, LoRADropout(0.1, spec.seed, spec.stream + 1)))
    for mask in (*masks, other):
        # Five standard deviations of 262,144 draws.
        assert abs((~mask).double().mean().item() - spec.threshold / 65536) < 5 * (0.1 * 0.9 / 512**2) ** 0.5
    for left, right in ((masks[0], masks[1]), (masks[0], other)):
        assert abs((~left & ~right).double().mean().item() - 0.01) < 0.002


def test_philox_gives_the_published_vector(device):
    """Random123's known answer for key and counter zero: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    for share in (0.2, 0.5, 0.8):
        spec = LoRADropout(share, seed)
        expected = torch.tensor([[half >= spec.threshold for half in halves]], device=device)
        assert torch.equal(dropout_mask_reference(1, 8, spec), expected)


def test_wrong_inputs_are_refused(device):
    x, a = torch.randn(4, 8, device=device), torch.randn(6, 8, device=device)
    with pytest.raises(ValueError, match="a has shape"):
        lora_project(x, a[:, :7].contiguous())
    with pytest.raises(ValueError, match="equal in all"):
        lora_project(x, a, dropout=dropout(device), groups=4)
    with pytest.raises(ValueError, match="sum to dy's width"):
        lora_backward_b(x, x[:, :2], x[:2].t().contiguous(), torch.zeros(8, 2, device=device), (4, 5))
    with pytest.raises(ValueError, match="allowed are"):
        LoRADropout(1.0, torch.zeros(1, dtype=torch.int64))
