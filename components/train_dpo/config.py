"""Configuration of `train-dpo`. Names are those of TRL, transformers, PEFT and bitsandbytes."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from finemill.training.config import LoRATrainingConfig

_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
_UNPAIRED = ("kto", "apo_zero_unpaired")
_COMPARING = ("kto", "aot", "aot_unpaired")


class TrainDPOConfig(LoRATrainingConfig):
    """Preference optimization of LoRA adapters on a 4-bit base, which is its own reference: DPO, ORPO, KTO."""

    whole_passes: ClassVar[bool] = True

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference: higher stays closer. With `ipo` the paper's tau, with `orpo` its
    lambda, the weight of the odds ratio."""

    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "orpo",
        "kto",
        "apo_zero_unpaired",
    ] = "sigmoid"
    """`sigmoid` is DPO's own, `sigmoid_norm` the same per token. `ipo` and `hinge` overfit less where preferences are
    certain, `robust` and `exo_pair` expect wrong ones; `apo_zero` also raises the chosen answers, `apo_down` lowers
    them too, for models that are better than the data; `aot` compares the sorted pairs of a batch. `orpo` learns the
    chosen answers and the preference at once, without a reference. `kto` and `apo_zero_unpaired` take each answer by
    itself, as good or bad. The rest are those of TRL's DPOTrainer."""

    sft_weight: float = Field(default=0.0, ge=0)
    """Adds the loss of the chosen answers with this weight, which keeps a preference from making them less likely."""

    desirable_weight: float = Field(default=1.0, gt=0)
    """With `kto` and `apo_zero_unpaired`, what good answers count."""

    undesirable_weight: float = Field(default=1.0, gt=0)
    """The same for bad answers; where there are fewer of one kind, both kinds should count about the same."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `robust` the share of preferences that are the wrong way round, `aot` and `aot_unpaired` likewise; with
    `exo_pair` its epsilon, about 1e-3."""

    precompute_ref_log_probs: bool = False
    """Score all pairs with the reference before training instead of in every step: faster from the second epoch on."""

    learning_rate: float = Field(default=5e-6, gt=0)
    """Peak learning rate; preferences need far less than demonstrations."""

    per_device_train_batch_size: int = Field(default=1, gt=0)
    """Pairs per device and forward pass; each is two sequences."""

    gradient_accumulation_steps: int = Field(default=16, gt=0)
    """Forward passes per optimizer step. The global batch size is the product of both and the number of processes."""

    max_length: int = Field(default=2048, gt=1)
    """Longer conversations, with either answer, are cut to this many tokens; pairs left without one of the answers are
    dropped and counted."""

    @property
    def sequences_per_row(self) -> int:
        """Sequences that one row of a batch is: both answers of a pair, or one answer."""
        return 1 if self.is_unpaired else 2

    @property
    def compares_rows(self) -> bool:
        """Whether the loss sorts the rows of a forward pass, or takes their mean."""
        return self.loss_type in _COMPARING

    @property
    def keeps_reference(self) -> bool:
        """Where there are no adapters to switch off, and the reference is asked in every step."""
        return self.method == "full" and self.loss_type != "orpo" and not self.precompute_ref_log_probs

    @property
    def is_unpaired(self) -> bool:
        """Whether the loss takes each answer by itself."""
        return self.loss_type in _UNPAIRED

    @property
    def needs_whole_base(self) -> bool:
        """Whether weights of the base are computed with or copied before it can be cut into shards."""
        return super().needs_whole_base or self.precompute_ref_log_probs

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing acts with loss_type {' or '.join(_SMOOTHED)} only, not with '{self.loss_type}': "
                "choose one of them or leave label_smoothing out"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type 'exo_pair' needs a label_smoothing above 0: its paper recommends 1e-3")
        where = f"with loss_type '{self.loss_type}'"
        self._refuse(
            self.loss_type == "orpo",
            where,
            sft_weight="lower beta, as it learns the chosen answers itself",
            precompute_ref_log_probs="choose a loss that has a reference",
        )
        self._refuse(self.is_unpaired, where, sft_weight="choose a loss of pairs")
        kinds = {"desirable_weight": "use 'kto'", "undesirable_weight": "use 'kto'"}
        self._refuse(not self.is_unpaired, where, **kinds)
        if self.keeps_reference and self.rope_scaling is not None:
            raise ValueError(
                "rope_scaling gives the model other positions than the reference, which TRL loads with method 'full' "
                "from the base's files: set precompute_ref_log_probs, and the model itself is asked before training"
            )
        if self.compares_rows and self.per_device_train_batch_size == 1:
            raise ValueError(
                f"loss_type '{self.loss_type}' compares the rows of a forward pass: set per_device_train_batch_size to "
                "2 or more (4 to 16 are usual)"
            )
        return self
