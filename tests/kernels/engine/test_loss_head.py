"""Final norm, head and loss in chunks equal the same in one piece, for labelled rows only."""

import pytest
import torch

from finemill.kernels.engine.loss_head import loss_head
from finemill.kernels.ops.packing import IGNORE_INDEX, PackedBatch, pack_sequences
from finemill.kernels.ops.rms_norm import rms_norm_reference

WIDTH, VOCABULARY, EPS = 32, 57, 1e-6


def case(device: str, labelled: float) -> tuple[PackedBatch, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (40,))
    labels = ids.where(torch.rand(40) < labelled, IGNORE_INDEX)
    batch = pack_sequences([(ids[:25], labels[:25]), (ids[25:], labels[25:])]).to(torch.device(device))
    x, delta = (torch.randn(40, WIDTH, device=device) for _ in range(2))
    return batch, x, delta, torch.rand(WIDTH, device=device) + 0.5, torch.randn(VOCABULARY, WIDTH, device=device)


@pytest.mark.parametrize("labelled", [0.3, 1.0])
@pytest.mark.parametrize("chunk", [7, 64])
def test_loss_gradient_and_metrics_equal_plain_autograd(labelled: float, chunk: int, device: str) -> None:
    batch, x, delta, norm, head = case(device, labelled)
    stream = (x + delta).double().requires_grad_()
    logits = rms_norm_reference(stream, norm.double(), EPS) @ head.double().t()
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    (grad,) = torch.autograd.grad(0.25 * expected, stream)
    scored = batch.labels != IGNORE_INDEX
    log_p = torch.log_softmax(logits, dim=-1)[scored]

    result = loss_head(x, delta.clone(), norm, EPS, head, batch, 0.25, chunk=chunk, pad=8)
    assert result.grad is not None
    assert result.grad.shape == (40, WIDTH + 8)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.grad[:, :WIDTH].double(), grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.entropy.double(), -(log_p.exp() * log_p).sum(), rtol=1e-5, atol=1e-5)
    assert result.correct == (logits[scored].argmax(-1) == batch.labels[scored]).sum()
    assert (result.grad[:, :WIDTH][~scored] == 0).all()


def test_a_batch_without_labels_has_loss_zero(device: str) -> None:
    batch, x, delta, norm, head = case(device, 0.0)
    result = loss_head(x, delta, norm, EPS, head, batch, 1.0, chunk=16, pad=0)
    assert result.loss == 0
    assert result.grad is not None
    assert (result.grad == 0).all()
