"""The configuration of a whole pipeline: a base model, and a section per step."""

from typing import Any

from pydantic import Field, create_model, field_validator

from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.eval.config import EvalConfig
from finemill.components.gguf_quantize.config import GGUFQuantizeConfig
from finemill.components.merge.config import MergeConfig
from finemill.components.preflight.config import PreflightSettings
from finemill.components.promote.config import PromoteConfig
from finemill.components.register.config import RegisterConfig
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.config import StepConfig


class FinetuneConfig(StepConfig):
    """Raw rows to a promoted model."""

    base_model: str = "builtin:tiny-qwen3"
    """The model to tune: `builtin:tiny-qwen3`, a local folder, or `hf://org/name@revision`."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against before it takes a GPU."""

    data_prep: DataPrepConfig
    """Which rows, how they are cleaned, mixed and split."""

    chat_format: ChatFormatConfig = Field(default_factory=ChatFormatConfig)
    """How rows become messages and tokens."""

    train_qlora: TrainQLoRAConfig = Field(default_factory=TrainQLoRAConfig)
    """Adapters, quantization, optimizer, schedule."""

    eval: EvalConfig = Field(default_factory=EvalConfig)
    """What is generated and scored."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """The merged model's precision and the tolerance of its check."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which GGUF files, and how they are checked."""

    # Python's abstract classes, pydantic's models among them, have a `register` of their own.
    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """The name in the model registry."""

    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    """The gates between a new version and the champion."""


class AlignConfig(StepConfig):
    """Preferences to a promoted model."""

    base_model: str = "builtin:tiny-qwen3"
    """The model to align: `builtin:tiny-qwen3`, a local folder, `hf://org/name@revision`, or the reference
    <uri>@sha256:<digest> of a merged model, as `merge` printed it: that is how a tuned model is aligned."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against before it takes a GPU."""

    data_prep: DataPrepConfig
    """Which rows, with a chosen and a rejected answer, and how they are cleaned, mixed and split."""

    chat_format: ChatFormatConfig = Field(default_factory=ChatFormatConfig)
    """How rows become messages and tokens."""

    train_dpo: TrainDPOConfig = Field(default_factory=TrainDPOConfig)
    """Loss, adapters, quantization, optimizer, schedule."""

    eval: EvalConfig = Field(default_factory=EvalConfig)
    """What is generated and scored."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """The merged model's precision and the tolerance of its check."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which GGUF files, and how they are checked."""

    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """The name in the model registry."""

    promote: PromoteConfig
    """The gates between a new version and the champion: on `preference_accuracy`, as in `configs/align.yaml`."""

    @field_validator("promote")
    @classmethod
    def _has_gates(cls, promote: PromoteConfig | None) -> PromoteConfig | None:
        """Promote's own gates ask for a lower loss on the chosen answers, which DPO raises as a rule."""
        if promote is not None and "gates" not in promote.model_fields_set:
            raise ValueError(
                "give gates: those of `promote` ask for a lower loss, which aligning raises as a rule; write "
                "gates: [{metric: preference_accuracy, direction: higher, min_delta: 0.0}]"
            )
        return promote


class ExportConfig(StepConfig):
    """A trained adapter to GGUF files and a registered version."""

    base_model: str
    """The model that the adapter was trained on."""

    adapter: str
    """Reference of the adapter, <uri>@sha256:<digest>, as `train-qlora` printed it."""

    dataset: str
    """Reference of the dataset whose held-out rows the GGUF files are checked on."""

    evaluation: str
    """Reference of the adapter's evaluation; its scores go into the registry."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against first."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """The merged model's precision and the tolerance of its check."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which GGUF files, and how they are checked."""

    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """The name in the model registry."""


def with_optional_fields(model: type[StepConfig]) -> type[StepConfig]:
    """The same configuration with nothing required: for a pipeline whose runs bring what is missing."""
    optional: dict[str, Any] = {
        name: (field.annotation | None, Field(default=None, description=field.description))
        for name, field in model.model_fields.items()
        if field.is_required() and field.annotation is not None
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **optional)
