"""Cross-entropy and its in-place gradient against fp64, at most 1.1 times Hugging Face's error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finemill.kernels.ops.cross_entropy import (
    cross_entropy_backward_reference,
    cross_entropy_inplace,
    cross_entropy_reference,
)
from finemill.kernels.ops.packing import IGNORE_INDEX

SHAPES = [(3, 1), (6, 123), (1, 4096), (5, 8200)]


def make(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with an outlier, a flat row and a masked (-inf) token; labels with one ignored row."""
    logits, labels = 3 * torch.randn(shape), torch.randint(0, shape[1], (shape[0],))
    logits[0, 0] = 80.0
    if shape[0] > 1 < shape[1]:
        logits[1] = 0.0
        logits[-1, 1], labels[-1] = float("-inf"), 0
        labels[2] = IGNORE_INDEX
    return logits.to(device, dtype), labels.to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_as_accurate_as_transformers(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    assert_as_accurate: Callable[..., None],
    pitched: Callable[..., torch.Tensor],
) -> None:
    logits, labels = make(shape, dtype, device)
    scale = 1.0 / 7

    def eager(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.clone().requires_grad_()
        loss = cross_entropy_reference(logits, labels)
        return loss, torch.autograd.grad(loss, logits, torch.full_like(loss, scale))[0]

    ours = pitched(logits)
    loss = cross_entropy_inplace(ours, labels, scale)
    (exact_loss, exact_grad), (eager_loss, eager_grad) = eager(logits.double()), eager(logits)
    assert_as_accurate(loss, eager_loss, exact_loss)
    assert_as_accurate(ours, eager_grad, exact_grad)
    assert (ours[labels == IGNORE_INDEX] == 0).all()
    assert (loss[labels == IGNORE_INDEX] == 0).all()


def test_a_real_vocabulary_fits(dtype: torch.dtype, device: str, assert_as_accurate: Callable[..., None]) -> None:
    logits, labels = make((3, 151936), dtype, device)
    exact = cross_entropy_backward_reference(logits.double(), labels, 1.0)
    eager = cross_entropy_backward_reference(logits, labels, 1.0)
    expected = cross_entropy_reference(logits.double(), labels)
    loss = cross_entropy_inplace(logits, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    assert_as_accurate(logits, eager, exact)


def test_scale_may_live_on_the_device(dtype: torch.dtype, device: str) -> None:
    logits, labels = make((6, 123), dtype, device)
    by_value, by_pointer = logits.clone(), logits.clone()
    cross_entropy_inplace(by_value, labels, 0.25)
    cross_entropy_inplace(by_pointer, labels, torch.tensor(0.25, device=device))
    assert torch.equal(by_value, by_pointer)


def test_without_grad_the_logits_stay(dtype: torch.dtype, device: str) -> None:
    logits, labels = make((6, 123), dtype, device)
    before = logits.clone()
    loss = cross_entropy_inplace(logits, labels, grad=False)
    assert torch.equal(logits, before)
    assert torch.equal(loss, cross_entropy_inplace(logits, labels))


def test_entropy_and_accuracy_come_from_the_same_pass(dtype: torch.dtype, device: str) -> None:
    logits, labels = make((6, 8200), dtype, device)
    labels[0] = 0  # the outlier of row 0
    entropy, correct = torch.empty(6, device=device), torch.empty(6, device=device)
    log_p = torch.log_softmax(logits.double(), dim=-1)
    expected = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)
    expected_correct = (logits.argmax(-1) == labels).float()
    cross_entropy_inplace(logits, labels, entropy_out=entropy, correct_out=correct)
    labelled = labels != IGNORE_INDEX
    torch.testing.assert_close(entropy.double(), expected * labelled, rtol=1e-5, atol=1e-5)
    # Row 1 is flat: every token is a most likely one.
    expected_correct[1] = 1.0
    assert torch.equal(correct, expected_correct * labelled)


def test_hand_derived_gradient_passes_gradcheck() -> None:
    labels = torch.tensor([2, IGNORE_INDEX, 0])

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(logits)
            return cross_entropy_reference(logits, labels).sum()

        @staticmethod
        def backward(ctx: Any, d_loss: torch.Tensor) -> torch.Tensor:
            (logits,) = ctx.saved_tensors
            return cross_entropy_backward_reference(logits, labels, d_loss)

    assert torch.autograd.gradcheck(Reference.apply, (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),))


def test_wrong_inputs_are_refused(device: str) -> None:
    logits = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="labels has shape"):
        cross_entropy_inplace(logits, torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="one fp32 element"):
        cross_entropy_inplace(logits, torch.zeros(4, dtype=torch.int64, device=device), torch.ones(2, device=device))
