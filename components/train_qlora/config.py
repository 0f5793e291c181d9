"""Configuration of `train-qlora`. Names are those of transformers, TRL, PEFT and bitsandbytes."""

from typing import Literal, Self

from pydantic import model_validator

from finemill.training.config import LoRATrainingConfig


class TrainQLoRAConfig(LoRATrainingConfig):
    """LoRA adapters on a 4-bit base: what is adapted, how it is quantized, and the training schedule."""

    packing: bool = False
    """Join short rows to sequences of max_length without attention between them. For GPUs: on a CPU it costs time."""

    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the rows; group_by_length puts rows of like length into a batch, which saves padding."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.packing and self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "packing fills every sequence, so train_sampling_strategy 'group_by_length' has nothing to group: "
                "use 'random' or turn packing off"
            )
        return self
