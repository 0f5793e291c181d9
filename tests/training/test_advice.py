import logging
from typing import Any

import pytest

from finemill.training.advice import warn_of_fit, warn_of_length
from finemill.training.config import LoRATrainingConfig

FALLING = [2.0 - 0.1 * point for point in range(12)]


@pytest.mark.parametrize(
    ("losses", "validation_losses", "message"),
    [
        ([*FALLING, 0.15, 0.1, 0.12], [], "training loss 0.123 is under 0.2, the model may know its rows by heart"),
        (FALLING, [1.5, 1.2, 1.3, 1.4, 1.5], "rose 3 evaluations in a row, to 1.5000 from 1.2000 at its best"),
        ([2.0, 2.1] * 6, [], "the loss did not fall (2.0500 at the beginning, 2.0500 at the end)"),
        (FALLING, [1.5, 1.2, 1.3, 1.4, 1.3], ""),
        ([2.0, 2.1, 2.2], [], ""),
        ([], [], ""),
    ],
)
def test_a_curve_gets_the_advice_that_fits_it(
    losses: list[float], validation_losses: list[float], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_fit(losses, validation_losses)
    assert message in caplog.text
    assert len(caplog.records) == bool(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 100}, "warmup_steps 100, and the training has 20 steps: it never comes to learning_rate"),
        ({"warmup_steps": 0.5}, ""),
        ({"eval_steps": 21}, "eval_steps 21, and the training has 20 steps: nothing is evaluated"),
        # The last weights are evaluated.
        ({"eval_steps": 21, "early_stopping_patience": 1}, ""),
        ({"gradient_accumulation_steps": 64}, "a step asks for 128 rows, and there are 40"),
    ],
)
def test_settings_for_a_longer_training_are_said(
    settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoRATrainingConfig(**settings)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    with caplog.at_level(logging.WARNING):
        warn_of_length(config, num_steps=20, num_rows=40, rows_per_step=rows)
    assert message in caplog.text
    assert len(caplog.records) == bool(message)
