"""The configuration of a whole pipeline: a base model, and a section per step."""

from pydantic import Field

from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.config import StepConfig
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.eval.config import EvalConfig
from finemill.components.gguf_quantize.config import GGUFQuantizeConfig
from finemill.components.merge.config import MergeConfig
from finemill.components.promote.config import PromoteConfig
from finemill.components.register.config import RegisterConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig


class FinetuneConfig(StepConfig):
    """Raw rows to a promoted model."""

    base_model: str = "builtin:tiny-qwen3"
    """The model to tune: `builtin:tiny-qwen3`, a local folder, or `hf://org/name@revision`."""

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
