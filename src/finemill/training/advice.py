"""What settings and loss curve say about over- and underfitting, and what the field does about it."""

import logging
from collections.abc import Sequence
from itertools import pairwise

from finemill.training.config import LoRATrainingConfig

logger = logging.getLogger(__name__)

LOW_LOSS = 0.2
"""Training loss below which a model mostly repeats its rows."""
RISES = 3
"""Evaluations in a row with a higher validation loss that are no chance."""
FEWEST_POINTS = 10
"""Points of the curve below which nothing is said about its slope."""


def warn_of_length(config: LoRATrainingConfig, *, num_steps: int, num_rows: int, rows_per_step: int) -> None:
    """Warn of settings for a longer training than this one.

    Args:
        config: that is trained with.
        num_steps: of the whole training.
        num_rows: of the training data.
        rows_per_step: of all processes.
    """
    if config.warmup_steps >= max(2, num_steps):
        logger.warning(
            "warmup_steps %g, and the training has %d steps: it never comes to learning_rate %g; a share, as 0.03, "
            "follows the number of steps",
            config.warmup_steps, num_steps, config.learning_rate,
        )  # fmt: skip
    if config.eval_steps is not None and config.eval_steps > num_steps and not config.early_stopping_patience:
        logger.warning(
            "eval_steps %d, and the training has %d steps: nothing is evaluated", config.eval_steps, num_steps
        )
    if rows_per_step > num_rows:
        logger.warning(
            "a step asks for %d rows, and there are %d: every step is a pass over all of them; lower "
            "per_device_train_batch_size or gradient_accumulation_steps",
            rows_per_step, num_rows,
        )  # fmt: skip


def warn_of_fit(losses: Sequence[float], validation_losses: Sequence[float]) -> None:
    """Warn of a curve that points to over- or underfitting.

    Args:
        losses: of training on demonstrations, in order.
        validation_losses: in order.
    """
    tail = losses[-3:]
    if tail and sum(tail) / len(tail) < LOW_LOSS:
        logger.warning(
            "training loss %.3f is under %g, the model may know its rows by heart: train for fewer epochs, lower "
            "learning_rate, give more rows, or set eval_steps and early_stopping_patience",
            sum(tail) / len(tail), LOW_LOSS,
        )  # fmt: skip
    rises = 0
    for before, after in pairwise(validation_losses):
        rises = rises + 1 if after > before else 0
    if rises >= RISES:
        logger.warning(
            "validation loss rose %d evaluations in a row, to %.4f from %.4f at its best: set early_stopping_patience, "
            "train for fewer epochs or lower learning_rate",
            rises, validation_losses[-1], min(validation_losses),
        )  # fmt: skip
    fifth = len(losses) // 5
    if len(losses) >= FEWEST_POINTS and sum(losses[-fifth:]) > 0.99 * sum(losses[:fifth]):
        logger.warning(
            "the loss did not fall (%.4f at the beginning, %.4f at the end): raise learning_rate, train longer, or "
            "look at what of the rows is learned",
            sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth,
        )  # fmt: skip
