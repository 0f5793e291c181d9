"""SwiGLU's backward with LoRA's sums against fp64, at most 1.1 times the error of the passes one by one."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops import swiglu_lora
from finemill.kernels.ops.launch import INTERPRETED
from finemill.kernels.ops.swiglu import swiglu_backward
from finemill.kernels.ops.swiglu_lora import (
    _dya_partial,
    runs_fused,
    swiglu_lora_backward,
    swiglu_lora_backward_reference,
)

# tokens, width, rank: one token, one column, several blocks, several chunks of tokens, ranks beyond the kernel's;
# widths of whole tiles, which Hopper's kernel takes, and ranks below and above its products'
SHAPES = [(1, 123, 4), (5, 1, 1), (70, 256, 16), (33, 600, 16), (37, 515, 24), (540, 320, 12), (19, 96, 64)]
SHAPES += [(1, 512, 4), (260, 768, 12), (200, 384, 32), (130, 128, 20)]


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    tokens, width, rank = shape
    parts = {
        "dh": torch.randn(tokens, width),
        "gate_up": 2 * torch.randn(tokens, 2 * width),
        "xa": torch.randn(tokens, 2 * rank),
        "b": torch.randn(2 * width, 2 * rank) / width**0.5,
        "dya_down": torch.randn(tokens, rank),
    }
    parts["gate_up"][:, 0] = -30.0  # silu underflows towards zero
    parts["gate_up"][0, -1] = 50.0
    parts["dh"][-1] *= 0.0 if tokens > 1 else 1.0
    return {name: part.to(device, dtype) for name, part in parts.items()}


def run(
    inputs: dict[str, torch.Tensor],
    scaling: float,
    pitched: Callable[..., torch.Tensor],
    pad: int = 64,
    start: float = 0.0,
) -> list[torch.Tensor]:
    """Return d_gate_up, dya, dB and dA, which begin with `start`."""
    rank, width = inputs["dya_down"].shape[1], inputs["dh"].shape[1]
    given = {name: pitched(part, pad) for name, part in inputs.items()}
    # The upper right and lower left blocks are never read.
    given["b"][:width, rank:] = given["b"][width:, :rank] = float("nan")
    device = given["dh"].device
    dya = pitched(torch.zeros_like(inputs["xa"]))
    grad_a, grad_b = (torch.full(shape, start, device=device) for shape in ((rank, width), (2 * width, rank)))
    dh, gate_up, xa, b, dya_down = given.values()
    swiglu_lora_backward(dh, gate_up, xa, b, dya_down, dya, grad_a, grad_b, scaling)
    return [given["gate_up"], dya, grad_b, grad_a]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sms", [1, 132])
def test_every_gradient_is_as_accurate_as_its_own_pass(
    shape: tuple[int, int, int],
    sms: int,
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swiglu_lora, "num_sms", lambda device: sms)  # on one, programs go round their stages many times
    inputs, scaling = make(shape, dtype, device), 0.5
    eager = swiglu_lora_backward_reference(*inputs.values())
    exact = swiglu_lora_backward_reference(*(part.double() for part in inputs.values()))
    width = shape[1]
    ours, dya, grad_b, grad_a = run(inputs, scaling, pitched)
    for part in (slice(None, width), slice(width, None)):
        assert_as_accurate(ours[:, part], eager[0][:, part], exact[0][:, part])
        assert_as_accurate(grad_b[part], scaling * eager[2][part], scaling * exact[2][part], tiny=2e-6)
    assert_as_accurate(dya, eager[1], exact[1], tiny=2e-6)
    assert_as_accurate(grad_a, eager[3], exact[3], tiny=2e-6)


def test_gradients_of_the_adapters_are_added(device: str, pitched: Callable[..., torch.Tensor]) -> None:
    inputs = make((40, 300, 8), torch.float32, device)
    for sums, total in zip(run(inputs, 0.5, pitched)[2:], run(inputs, 0.5, pitched, start=1.0)[2:], strict=True):
        assert torch.equal(total, 1.0 + sums)


def test_gate_and_up_get_what_the_pass_for_them_alone_gives(
    dtype: torch.dtype, device: str, pitched: Callable[..., torch.Tensor]
) -> None:
    inputs = make((40, 512, 16), dtype, device)
    if device == "cuda" and not runs_fused(inputs["gate_up"], 16):
        pytest.skip("no kernel for this dtype on this device")
    expected = swiglu_backward(inputs["dh"], inputs["gate_up"])
    torch.testing.assert_close(run(inputs, 1.0, pitched)[0], expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize("shape", [(140 if INTERPRETED else 540, 256, 16), (33, 600, 16), (3000, 384, 32)])
def test_runs_repeat_bit_for_bit_wherever_the_partial_sums_lie(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, pitched: Callable[..., torch.Tensor]
) -> None:
    inputs = make(shape, dtype, device)
    # Rows of dh that start at odd multiples of two bytes have no room for fp32, nor can Hopper's kernel address them.
    on_hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    # The interpreter runs one program after another: there only the place of the sums could make a difference.
    elsewhere = ((64, 63),) if INTERPRETED else ((64, 64, 63),)
    for pads in ((64, 64, 128), (63, 63, 61)) if on_hopper else elsewhere:
        first, *others = (run(inputs, 2.0, pitched, pad) for pad in pads)
        for other in others:
            for left, right in zip(first, other, strict=True):
                assert torch.equal(left, right)


def test_partial_sums_lie_in_dh_where_they_fit() -> None:
    dh = torch.zeros(8, 512, dtype=torch.bfloat16)
    for columns, rank in ((256, 16), (256, 64), (128, 32)):
        assert _dya_partial(dh, rank, columns)[0].data_ptr() == dh.data_ptr()
    for other, rank in ((dh, 65), (dh[:, :-1], 16), (dh[:, :300], 16)):
        assert _dya_partial(other, rank, 256)[0].data_ptr() != dh.data_ptr()


def test_wrong_inputs_are_refused(device: str) -> None:
    inputs = make((4, 8, 2), torch.float32, device)
    dh, gate_up, xa, b, dya_down = inputs.values()
    dya, grad_a, grad_b = (torch.zeros(shape, device=device) for shape in ((4, 4), (2, 8), (16, 2)))
    with pytest.raises(ValueError, match="gate_up has shape"):
        swiglu_lora_backward(dh, gate_up[:, :15], xa, b, dya_down, dya, grad_a, grad_b, 1.0)
    with pytest.raises(ValueError, match="xa is"):
        swiglu_lora_backward(dh, gate_up, xa.half(), b, dya_down, dya, grad_a, grad_b, 1.0)
    wide = torch.zeros(2, 16, device=device)[:, :8]
    with pytest.raises(ValueError, match="grad_a has strides"):
        swiglu_lora_backward(dh, gate_up, xa, b, dya_down, dya, wide, grad_b, 1.0)
