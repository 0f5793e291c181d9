"""Configuration of `train-qlora`. Names are those of transformers, TRL, PEFT and bitsandbytes."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from finemill.training.config import LoRATrainingConfig


class TrainQLoRAConfig(LoRATrainingConfig):
    """LoRA adapters on a 4-bit base: what is adapted, how it is quantized, and the training schedule."""

    not_in_key: ClassVar[frozenset[str]] = LoRATrainingConfig.not_in_key | {"context_parallel"}

    packing: bool = False
    """Join short rows to sequences of max_length without attention between them; on a CPU it saves nothing."""

    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the rows; group_by_length puts rows of like length into a batch, which saves padding."""

    context_parallel: int = Field(default=1, gt=0)
    """GPUs of a host that share each row, for rows too long for one: each holds a part of the tokens, and attention
    exchanges them for heads, whose number it must divide. Not on the kernels."""

    @property
    def processes_per_row(self) -> int:
        """As many as `context_parallel` says."""
        return self.context_parallel

    @model_validator(mode="after")
    def _can_cut_rows(self) -> Self:
        if self.context_parallel == 1:
            return self
        reasons = {
            "packing joins rows that attention must keep apart: leave packing out": self.packing,
            "evaluations need whole rows: leave eval_steps out": self.eval_steps is not None,
            "NEFTune's noise depends on a row's length: leave neftune_noise_alpha out": self.neftune_noise_alpha
            is not None,
            "kernels 'on' train whole rows: use kernels 'auto' or 'off'": self.kernels == "on",
            f"strategy '{self.strategy}' trains whole rows: use 'auto', 'ddp' or 'fsdp2'": self.strategy
            not in ("auto", "ddp", "fsdp2"),
        }
        if reason := next((reason for reason, applies in reasons.items() if applies), None):
            raise ValueError(f"context_parallel {self.context_parallel} cuts rows among GPUs, and {reason}")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.packing and self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "packing fills every sequence, so train_sampling_strategy 'group_by_length' has nothing to group: "
                "use 'random' or turn packing off"
            )
        return self
