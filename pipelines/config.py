"""The configuration of each pipeline, a section per step; `make components` writes it from the graphs."""

from pydantic import Field

from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.eval.config import EvalConfig
from finemill.components.gguf_quantize.config import GGUFQuantizeConfig
from finemill.components.merge.config import MergeConfig
from finemill.components.preflight.config import PreflightSettings
from finemill.components.promote.config import PromoteConfig
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.config import Input, StepConfig
from finemill.pipelines.gates import PreferencePromoteConfig
from finemill.registry.config import RegisterConfig


class FinetuneConfig(StepConfig):
    """Raw rows and a base model in; adapter, merged model, GGUF files, report and a promoted version out."""

    base_model: Input = "builtin:tiny-qwen3"
    """The model to tune: hf://org/name@revision, a folder, or builtin:tiny-qwen3."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against before it takes a GPU."""

    data_prep: DataPrepConfig
    """Which rows to read, how to clean and split them, and in which shares they are trained on."""

    chat_format: ChatFormatConfig = Field(default_factory=ChatFormatConfig)
    """How rows become token ids and labels."""

    train_qlora: TrainQLoRAConfig = Field(default_factory=TrainQLoRAConfig)
    """LoRA adapters on a 4-bit base: what is adapted, how it is quantized, and the training schedule."""

    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Which held-out rows are scored, and how the answers are generated."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """How the adapter is added to the base, and how closely the result must agree with base and adapter."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which files to write, and how closely each is compared with the merged model."""

    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """Under which name, and with what besides its digests, a version is registered."""

    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    """The gates between a new version and the champion."""


class AlignConfig(StepConfig):
    """Preferences and a base model in; adapter, merged model, GGUF files, report and a promoted version out."""

    base_model: Input = "builtin:tiny-qwen3"
    """The model to align: hf://org/name@revision, a folder, builtin:tiny-qwen3, or the reference <uri>@sha256:<digest>
    of a merged model, as `merge` printed it: that is how a tuned model is aligned."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against before it takes a GPU."""

    data_prep: DataPrepConfig
    """Which rows to read, how to clean and split them, and in which shares they are trained on."""

    chat_format: ChatFormatConfig = Field(default_factory=ChatFormatConfig)
    """How rows become token ids and labels."""

    train_dpo: TrainDPOConfig = Field(default_factory=TrainDPOConfig)
    """Preference optimization of LoRA adapters on a 4-bit base, which is its own reference: DPO, ORPO, KTO."""

    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Which held-out rows are scored, and how the answers are generated."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """How the adapter is added to the base, and how closely the result must agree with base and adapter."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which files to write, and how closely each is compared with the merged model."""

    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """Under which name, and with what besides its digests, a version is registered."""

    promote: PreferencePromoteConfig
    """The gates between a new version and the champion: on `preference_accuracy`, as in `configs/align.yaml`."""


class RetrainConfig(StepConfig):
    """Ends as unchanged unless there is new data; otherwise trains, evaluates, exports, and promotes what is better."""

    base_model: Input = "builtin:tiny-qwen3"
    """The model to tune: hf://org/name@revision, a folder, or builtin:tiny-qwen3."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against before it takes a GPU."""

    data_prep: DataPrepConfig
    """Which rows to read, how to clean and split them, and in which shares they are trained on."""

    chat_format: ChatFormatConfig = Field(default_factory=ChatFormatConfig)
    """How rows become token ids and labels."""

    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """Under which name, and with what besides its digests, a version is registered."""

    train_qlora: TrainQLoRAConfig = Field(default_factory=TrainQLoRAConfig)
    """LoRA adapters on a 4-bit base: what is adapted, how it is quantized, and the training schedule."""

    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Which held-out rows are scored, and how the answers are generated."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """How the adapter is added to the base, and how closely the result must agree with base and adapter."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which files to write, and how closely each is compared with the merged model."""

    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    """The gates between a new version and the champion."""


class ExportConfig(StepConfig):
    """Merge an adapter into its base, write and check GGUF files, and register the result."""

    base_model: Input
    """The model that the adapter was trained on, hf://org/name@revision."""

    adapter: Input
    """Reference of the adapter, <uri>@sha256:<digest>."""

    dataset: Input
    """Reference of the dataset whose held-out rows check the GGUF files."""

    evaluation: Input
    """Reference of the adapter's evaluation."""

    preflight: PreflightSettings = Field(default_factory=PreflightSettings)
    """What a run in a cluster is checked against before it takes a GPU."""

    merge: MergeConfig = Field(default_factory=MergeConfig)
    """How the adapter is added to the base, and how closely the result must agree with base and adapter."""

    gguf_quantize: GGUFQuantizeConfig = Field(default_factory=GGUFQuantizeConfig)
    """Which files to write, and how closely each is compared with the merged model."""

    register_: RegisterConfig = Field(default_factory=RegisterConfig, alias="register")
    """Under which name, and with what besides its digests, a version is registered."""
