"""The artifact `adapter`: LoRA weights and a tokenizer as Hugging Face saves them, and how they were trained."""

import math
from pathlib import Path
from typing import Any

from finemill.artifacts.files import TRAINING_FILE
from finemill.artifacts.records import Record, read_record, write_record

Curve = list[tuple[int, float]]


class TrainingRecord(Record):
    """The course of a training; `log_history` is the trainer's own, whose names are those of transformers."""

    max_steps: int
    log_history: tuple[dict[str, Any], ...]
    base_digest: str | None = None
    """Digest of the base model, as `models/base/resolve.py` computes it."""
    unquantized_base_digest: str | None = None
    """The same of the model that the base was made from, where the base is in 4 bits on the disk: for merging."""
    layers_in_16_bits: tuple[str, ...] = ()
    """Linear layers that such a base keeps in 16 bits."""
    rope_parameters: dict[str, Any] | None = None
    """The base's positions where the training scaled them, as transformers' configuration has them."""

    @property
    def num_steps(self) -> int:
        """The last step that was logged."""
        return max((int(entry["step"]) for entry in self.log_history if "step" in entry), default=0)

    @property
    def training_losses(self) -> Curve:
        """(step, loss) of every finite point."""
        return self._curve("loss")

    @property
    def validation_losses(self) -> Curve:
        """(step, loss) of every finite point."""
        return self._curve("eval_loss")

    def _curve(self, name: str) -> Curve:
        points = [(int(entry["step"]), entry[name]) for entry in self.log_history if name in entry]
        return [(step, float(value)) for step, value in points if _is_finite(value)]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def write_training(folder: Path, record: TrainingRecord) -> None:
    """Put the record beside the adapter's weights."""
    write_record(folder / TRAINING_FILE, record)


def read_training(folder: Path) -> TrainingRecord | None:
    """How an adapter was trained; None for one that was not made here. Raises: UserError: the record is damaged."""
    path = folder / TRAINING_FILE
    return read_record(path, TrainingRecord, "train-qlora") if path.is_file() else None


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter or a model brings its tokenizer along."""
    return (folder / "tokenizer_config.json").is_file()
