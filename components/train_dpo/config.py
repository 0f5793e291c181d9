"""Configuration of `train-dpo`. Names are those of TRL, transformers, PEFT and bitsandbytes."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from finemill.training.config import LoRATrainingConfig

_SMOOTHED = ("robust", "exo_pair")


class TrainDPOConfig(LoRATrainingConfig):
    """Direct preference optimization of LoRA adapters on a 4-bit base, which is its own reference."""

    sequences_per_row: ClassVar[int] = 2

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference: higher stays closer. With `ipo` the paper's tau."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "apo_zero", "apo_down"] = "sigmoid"
    """`sigmoid` is DPO's own. `ipo` and `hinge` overfit less where preferences are certain, `robust` and `exo_pair`
    expect wrong ones; `apo_zero` also raises the chosen answers, `apo_down` lowers them too, for models that are better
    than the data."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `robust` the share of preferences that are the wrong way round; with `exo_pair` its epsilon, about 1e-3."""

    precompute_ref_log_probs: bool = False
    """Score all pairs with the reference before training instead of in every step: faster from the second epoch on."""

    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak learning rate; preferences need far less than demonstrations."""

    per_device_train_batch_size: int = Field(default=1, gt=0)
    """Pairs per device and forward pass; each is two sequences."""

    gradient_accumulation_steps: int = Field(default=16, gt=0)
    """Forward passes per optimizer step. The global batch size is the product of both and the number of processes."""

    max_length: int = Field(default=2048, gt=0)
    """Longer conversations, with either answer, are cut to this many tokens; pairs left without one of the answers are
    dropped and counted."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing acts with loss_type {' or '.join(_SMOOTHED)} only, not with '{self.loss_type}': "
                "choose one of them or leave label_smoothing out"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type 'exo_pair' needs a label_smoothing above 0: its paper recommends 1e-3")
        return self
