from pathlib import Path

import pytest

from finemill.artifacts.adapter import TrainingRecord, read_training, write_training
from finemill.artifacts.files import TRAINING_FILE
from finemill.errors import UserError

RECORD = TrainingRecord(
    max_steps=4,
    log_history=({"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "eval_loss": 1}, {"step": 4}),
)


def test_a_training_survives_its_file(tmp_path: Path) -> None:
    write_training(tmp_path, RECORD)
    read = read_training(tmp_path)
    assert read is not None
    assert (read.max_steps, read.num_steps) == (4, 4)
    assert (read.training_losses, read.validation_losses) == ([(1, 2.0)], [(3, 1.0)])


def test_an_adapter_from_elsewhere_has_no_record(tmp_path: Path) -> None:
    assert read_training(tmp_path) is None


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / TRAINING_FILE).write_text('{"max_steps": 3}')
    with pytest.raises(UserError, match="'log_history': Field required"):
        read_training(tmp_path)
