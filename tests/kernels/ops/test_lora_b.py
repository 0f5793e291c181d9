"""dy B and dB in one pass against fp64, at most 1.1 times the error of two products."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from finemill.kernels.ops import lora_b
from finemill.kernels.ops.division import lora_b_bytes
from finemill.kernels.ops.lora_b import has_kernel, lora_backward_b, lora_backward_b_reference

Case = tuple[int, tuple[int, ...], int]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

# tokens, group sizes, rank: one token, several chunks of tokens, groups that tiles of 256 and of 128 columns fit, a
# last tile that is not full, ranks below and above the products'
CASES: list[Case] = [
    (1, (512,), 8),
    (700, (1024, 512, 512), 16),
    (300, (640, 128, 128), 8),
    (2000, (128, 128), 32),
    (90, (600,), 24),
]
SCALING = 0.5


def make(
    case: Case, dtype: torch.dtype, device: str
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[tuple[int, int]], int]:
    tokens, sizes, rank = case
    width, ranks = sum(sizes), len(sizes) * rank
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    dy, xa, b = torch.randn(tokens, width), torch.randn(tokens, ranks), torch.randn(width, ranks) / width**0.5
    return (dy.to(device, dtype), xa.to(device, dtype), b.to(device, dtype)), list(pairwise(bounds)), rank


def run(
    case: Case, dtype: torch.dtype, pitched: Callable[..., torch.Tensor], start: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dya and dB, which begins with `start`."""
    (dy, xa, b), groups, rank = make(case, dtype, "cuda")
    pitched_b = pitched(b, 64)
    for group, (first, end) in enumerate(groups):  # the other blocks are never read
        pitched_b[first:end, : group * rank] = pitched_b[first:end, (group + 1) * rank :] = float("nan")
    dya = pitched(torch.zeros_like(xa))
    grad = torch.full((dy.shape[1], rank), start, device="cuda")
    lora_backward_b(pitched(dy, 64), pitched(xa, 64), pitched_b, groups, dya, grad, SCALING)
    return dya, grad


def test_the_reference_is_what_autograd_finds() -> None:
    (dy, xa, b), groups, rank = make((7, (6, 4), 3), torch.float64, "cpu")
    blocks = [b[first:end, g * rank : (g + 1) * rank] for g, (first, end) in enumerate(groups)]
    members = [block.clone().requires_grad_() for block in blocks]
    xa.requires_grad_()
    parts = [xa[:, g * rank : (g + 1) * rank] @ member.t() for g, member in enumerate(members)]
    torch.cat(parts, dim=1).backward(dy)
    dya, grad = lora_backward_b_reference(dy, xa.detach(), b, groups, rank)
    torch.testing.assert_close(dya, xa.grad)
    torch.testing.assert_close(grad, torch.cat([member.grad for member in members if member.grad is not None]))


@hopper
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sms", [1, 132])
def test_both_sums_are_as_accurate_as_products_of_their_own(
    case: Case,
    dtype: torch.dtype,
    sms: int,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora_b, "num_sms", lambda device: sms)  # on one, programs go round their stages many times
    torch.manual_seed(0)
    ours = run(case, dtype, pitched)
    torch.manual_seed(0)
    (dy, xa, b), groups, rank = make(case, dtype, "cuda")
    eager = lora_backward_b_reference(dy, xa, b, groups, rank)
    exact = lora_backward_b_reference(dy.double(), xa.double(), b.double(), groups, rank)
    # Tensor cores truncate what they add: 2000 tokens in one program leave 2.6e-6 of the largest sum.
    tiny = 4e-6 if sms == 1 else 2e-6
    assert_as_accurate(ours[0], eager[0], exact[0], tiny=tiny)
    assert_as_accurate(ours[1], SCALING * eager[1], SCALING * exact[1], tiny=tiny)


@hopper
def test_runs_repeat_bit_for_bit_and_the_gradient_is_added(pitched: Callable[..., torch.Tensor]) -> None:
    def seeded(start: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return run((3000, (1024, 512, 512), 16), torch.bfloat16, pitched, start)

    (dya, grad), again, added = seeded(), seeded(), seeded(1.0)
    assert torch.equal(dya, again[0])
    assert torch.equal(grad, again[1])
    assert torch.equal(added[1], 1.0 + grad)


def test_what_has_no_kernel_says_so() -> None:
    dy, xa = torch.zeros(4, 512, dtype=torch.bfloat16), torch.zeros(4, 16, dtype=torch.bfloat16)
    assert not has_kernel(dy, xa, [(0, 512)], 16)  # on the CPU
    assert lora_b_bytes(4096, [(0, 512)], 16) > 0
    assert lora_b_bytes(4096, [(0, 512)], 20) == 0  # rows of xa that TMA cannot address
    assert lora_b_bytes(4096, [(0, 512)], 64) == 0  # more sums than registers
    assert lora_b_bytes(4096, [(0, 96), (96, 512)], 16) == 0  # a tile with columns of two groups


@hopper
def test_wrong_inputs_are_refused() -> None:
    (dy, xa, b), groups, rank = make((8, (512,), 16), torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="xa has shape"):
        lora_backward_b(dy, xa[:, :8], b, groups, xa, torch.zeros(512, rank, device="cuda"), 1.0)
    with pytest.raises(ValueError, match="grad_b is"):
        lora_backward_b(dy, xa, b, groups, xa, torch.zeros(512, rank, device="cuda").half(), 1.0)
