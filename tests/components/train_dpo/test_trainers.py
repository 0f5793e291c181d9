from pathlib import Path
from typing import Any

import pytest
import torch

from finemill.components.train_dpo.trainers import TokenizedKTOTrainer, TokenizedORPOTrainer, add_noise
from finemill.kernels.preferences import on_engine
from tests.kernels.test_preferences import history, train


def test_noise_comes_with_what_is_learned_from_and_not_with_the_reference() -> None:
    """TRL's trainers ask the model in training mode for both."""
    model = torch.nn.Embedding(8, 4)
    model.get_input_embeddings = lambda: model  # type: ignore[assignment]
    add_noise(model, 5.0)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(ids), model.weight[ids])
    with torch.no_grad():
        assert torch.equal(model(ids), model.weight[ids])
    model.eval()
    assert torch.equal(model(ids), model.weight[ids])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with transformers in float32 on a CPU")
@pytest.mark.parametrize("trainer_class", [TokenizedORPOTrainer, TokenizedKTOTrainer])
def test_losses_on_the_kernels_are_those_beside_them(trainer_class: Any, tmp_path: Path) -> None:
    expected = train(trainer_class, tmp_path, max_steps=2)
    got = train(on_engine(trainer_class), tmp_path, max_steps=2)
    assert got.fast, got.acceleration.reason
    for ours, theirs in zip(history(got), history(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
