import logging

import pytest

from finemill.training.advice import warn_of_fit

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
