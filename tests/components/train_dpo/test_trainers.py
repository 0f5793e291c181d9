import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finemill.components.train_dpo.trainers import ORPOTrainer, TokenizedKTOTrainer, orpo_loss
from finemill.kernels.preferences import on_engine
from tests.kernels.test_preferences import history, train


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with transformers in float32 on a CPU")
@pytest.mark.parametrize("trainer_class", [ORPOTrainer, TokenizedKTOTrainer])
def test_losses_on_the_kernels_are_those_beside_them(trainer_class: Any, tmp_path: Path) -> None:
    expected = train(trainer_class, tmp_path, max_steps=2)
    got = train(on_engine(trainer_class), tmp_path, max_steps=2)
    assert got.fast, got.acceleration.reason
    for ours, theirs in zip(history(got), history(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
