import math

import pytest
import torch

from finemill.kernels.orpo import orpo_loss


def test_orpo_prefers_by_the_ratio_of_the_odds() -> None:
    better, worse = 0.5, 0.2
    log_odds = math.log(better / (1 - better)) - math.log(worse / (1 - worse))
    expected = -0.3 * math.log(1 / (1 + math.exp(-log_odds)))
    loss = orpo_loss(torch.tensor([math.log(better)]), torch.tensor([math.log(worse)]), beta=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_answer_that_is_certain_has_a_finite_loss_and_gradient() -> None:
    certain = torch.zeros(1, requires_grad=True)
    loss = orpo_loss(certain, torch.tensor([-1.0]), beta=0.1)
    (gradient,) = torch.autograd.grad(loss, certain)
    assert math.isfinite(loss.item())
    assert torch.isfinite(gradient).all()
