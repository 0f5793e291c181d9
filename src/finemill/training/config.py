"""The configuration that training steps share, in the words of transformers, PEFT, bitsandbytes."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from finemill.config import StepConfig
from finemill.config_file import read_mapping
from finemill.errors import UserError
from finemill.models.rope import RopeScaling

SHARDED = ("fsdp2", "zero2", "zero3")
"""Strategies that cut the model, or its optimizer, into shards."""

TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "embeddings")
"""What families call embeddings and output layer."""

_OF_ADAPTERS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "target_modules",
    "modules_to_save",
    "train_router",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)
"""Fields that say something about adapters or the frozen base below them."""


def read_settings(value: Any) -> Any:
    """The mapping that a file holds where a file is named; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return read_mapping(Path(value), "strategy_config")
    except UserError as error:
        raise ValueError(str(error)) from None


_GROUPS = ("all-linear", "attention", "mlp")
"""What `target_modules` may be instead of names."""


class LoRATrainingConfig(StepConfig):
    """What is trained of the base, how it is quantized, and the training schedule."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {
            "ddp_timeout",
            "gradient_checkpointing",
            "memory_gb",
            "num_nodes",
            "offload",
            "report_to",
            "resume",
            "save_steps",
            "save_total_limit",
            "strategy",
            "strategy_config",
        }
    )

    whole_passes: ClassVar[bool] = False
    """Whether a loss compares the rows of a forward pass, so that it can be neither cut nor merged with others."""

    @property
    def compares_rows(self) -> bool:
        """Whether the loss of a row depends on the others of its forward pass: with fewer of them it is another one."""
        return False

    @property
    def keeps_reference(self) -> bool:
        """Whether a second model, the base as it was, stays beside the one that is trained."""
        return False

    @property
    def sequences_per_row(self) -> int:
        """Sequences that one row of a batch is."""
        return 1

    @property
    def processes_per_row(self) -> int:
        """Processes that share the tokens of one row."""
        return 1

    method: Literal["lora", "full"] = "lora"
    """Train adapters on the frozen base, or every weight of it (`full`): in float32 with 16-bit products, 16 bytes per
    weight with AdamW. The output is an adapter that holds whole weights, which every later step takes as any other."""

    lora_r: int = Field(default=16, gt=0)
    """Rank of the adapters: more capacity, more memory."""

    lora_alpha: int = Field(default=32, gt=0)
    """Scale of the adapters; they are multiplied by lora_alpha / lora_r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead, which keeps high ranks stable."""

    use_dora: bool = False
    """DoRA: a trained length for each row of a weight beside LoRA's change of its direction. Not on the kernels."""

    init_lora_weights: Literal["default", "gaussian", "loftq"] = "default"
    """How adapters begin: `default` and `gaussian` as no change; `loftq` as what 4 bits lose of the base, so that
    training begins at the unquantized model. The saved adapter is for that one, and has twice the rank."""

    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: B learns at learning_rate times this, A at learning_rate; its paper recommends 16."""

    target_modules: Literal["all-linear", "attention", "mlp"] | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters: all but the output layer, those of attention, those of the MLPs, or by name. Of
    a mixture every expert gets one of its own, with `all-linear` and `mlp`, and routers never do."""

    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained as a whole beside the adapters, as `embed_tokens` and `lm_head` for a new language;
    saved with the adapter. Not on the kernels."""

    train_router: bool = False
    """Train a mixture's routers as well, as a whole and with the auxiliary loss that keeps all experts in use. They are
    frozen by default. Not on the kernels."""

    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the routers' auxiliary loss where they are trained; the base's own by default."""

    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of embeddings and output layer where they are trained; for continued pre-training a tenth to
    a half of learning_rate. By default learning_rate."""

    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: noise on embeddings during training, 5 to 15; answers of small sets get less literal. Not on the
    kernels."""

    load_in_4bit: bool = True
    """Quantize the base to 4 bits. Without it this is LoRA on the base as it is: faster, four times its memory."""

    load_in_8bit: bool = False
    """Quantize the base to 8 bits (LLM.int8) in place of 4. Not on the kernels."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""

    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too: 0.4 bits per weight less."""

    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the matrix products; auto is bfloat16 on GPUs that have it, float16 on older ones, float32 on a CPU."""

    memory_gb: float | None = Field(default=None, gt=0)
    """GiB of GPU memory that training may allocate; all that is free by default. On finemill's kernels it decides what
    is recomputed, what waits in host memory, and how large micro-batches are: speed, never the global batch."""

    strategy: Literal["auto", "ddp", "shard", "fsdp2", "zero2", "zero3"] = "auto"
    """How several processes share the training: copies of the model (`ddp`), a 4-bit base that the GPUs of a host
    divide among them, on finemill's kernels (`shard`), shards of all of it by PyTorch's FSDP2 (`fsdp2`) or DeepSpeed
    (`zero3`), or shards of gradients and moments alone (`zero2`). `auto` takes copies where one fits a card, `shard`
    where a 4-bit one does not, else fsdp2."""

    offload: bool = False
    """Shards wait in host memory while they are not needed: the largest models, at the speed of PCIe."""

    strategy_config: Annotated[dict[str, Any] | None, BeforeValidator(read_settings)] = None
    """Settings of your own in the place of finemill's, or the YAML or JSON file that holds them: with fsdp2 the
    `fsdp_config` of transformers, with zero2 and zero3 DeepSpeed's configuration."""

    ddp_timeout: int = Field(default=1800, gt=0)
    """Seconds that a process waits for the others, before the training ends with exit code 75."""

    num_nodes: int = Field(default=1, gt=0)
    """Nodes that share the training, in a cluster with Kubeflow Trainer: with more than one the step creates a
    TrainJob, follows it and ends as it does. `strategy` says what the GPUs of all of them share."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows."""

    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, in the place of num_train_epochs."""

    per_device_train_batch_size: int = Field(default=2, gt=0)
    """Sequences per device and forward pass."""

    gradient_accumulation_steps: int = Field(default=8, gt=0)
    """Forward passes per optimizer step. The global batch size is the product of both and the number of processes."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup"] = (
        "linear"
    )
    """Shape of the schedule after the warm-up; `constant` has none."""

    lr_num_cycles: int | None = Field(default=None, gt=1)
    """Cosines of `cosine_with_restarts`, each from the peak rate to zero."""

    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps of linear warm-up; below 1 a share of all steps."""

    weight_decay: float = Field(default=0.0, ge=0)
    """The optimizer's decay of the weights that are trained."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    optim: Literal[
        "auto",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adafactor",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
    ] = "auto"
    """The optimizer. `auto` is AdamW, on finemill's kernels with 8-bit moments where memory is short; any other name is
    what runs, on the kernels, too. 8 bits save 6 bytes per trained weight, Adafactor almost all 8; paged ones move to
    host memory when the card is full."""

    max_length: int = Field(default=2048, gt=1)
    """Longer rows are cut to this many tokens; rows left without a label are dropped and counted."""

    rope_scaling: RopeScaling | None = None
    """More positions than the base was made with, as `{rope_type: yarn, factor: 4}`: the adapter remembers them, and
    the config.json of the merged model has them, where vLLM and llama.cpp read them."""

    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: much less memory, about a quarter more time. `auto` does so where the
    card would not hold them, on a CPU where all takes more than a GiB. Shards without it keep whole logits, too."""

    kernels: Literal["auto", "on", "off"] = "auto"
    """Run steps on finemill's own kernels: on a GPU wherever they cover the model, or fail where they do not, or never.
    They plan recomputation by themselves, so gradient_checkpointing does not apply to them."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the adapters' initialization and of the rows' order."""

    logging_steps: int = Field(default=10, gt=0)
    """Steps between two points of the loss curve."""

    report_to: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = ("mlflow",)
    """Where the curves go while training runs. Weights & Biases reads WANDB_API_KEY, WANDB_PROJECT and WANDB_MODE
    (`offline`), TensorBoard TENSORBOARD_LOGGING_DIR (default `runs`)."""

    eval_steps: int | None = Field(default=None, gt=0)
    """Steps between two measurements of the loss on the validation rows; none by default."""

    early_stopping_patience: int | None = Field(default=None, gt=0)
    """Evaluations without a lower validation loss after which training stops; the output has the weights of the best
    evaluation then, also if training comes to its end."""

    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """How much lower a validation loss has to be to count."""

    save_steps: Annotated[int, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Steps between two checkpoints in the store; `auto` writes the first after half a minute and then as many as
    training stands still for during 1 % of the time; `null` writes them only when the run is told to stop."""

    save_total_limit: int = Field(default=2, gt=0)
    """Checkpoints kept in the store."""

    resume: Literal["auto", "never", "must"] = "auto"
    """Continue from the newest checkpoint in the store: if there is one, never, or fail without one."""

    @field_validator("kernels", mode="before")
    @classmethod
    def _is_a_word(cls, value: Any) -> Any:
        """YAML, and with it a flag, reads `on` and `off` as truth values."""
        return ("off", "on")[value] if isinstance(value, bool) else value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _is_group_or_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in _GROUPS:
            raise ValueError(
                f"'{value}' is none of {', '.join(_GROUPS)}: write the names of layers as a list, [{value}]"
            )
        if isinstance(value, list | tuple) and (groups := [name for name in value if name in _GROUPS]):
            raise ValueError(
                f"'{groups[0]}' stands for layers by itself, not in a list: write target_modules: {groups[0]}"
            )
        return value

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        restarts, constant = self.lr_scheduler_type == "cosine_with_restarts", self.lr_scheduler_type == "constant"
        if restarts and self.lr_num_cycles is None:
            raise ValueError("lr_scheduler_type 'cosine_with_restarts' needs lr_num_cycles, 2 or more, or use 'cosine'")
        schedule = f"with lr_scheduler_type '{self.lr_scheduler_type}'"
        self._refuse(not restarts, schedule, lr_num_cycles="use 'cosine_with_restarts'")
        self._refuse(constant and self.warmup_steps > 0, schedule, warmup_steps="use 'constant_with_warmup'")
        self._refuse(
            self.bits != 4,
            f"on a base of {self.bits} bits",
            bnb_4bit_quant_type="quantize to 4",
            bnb_4bit_use_double_quant="quantize to 4",
        )
        self._refuse(self.eval_steps is None, "without eval_steps", early_stopping_patience="set eval_steps")
        self._refuse(
            self.early_stopping_patience is None,
            "without early_stopping_patience",
            early_stopping_threshold="set early_stopping_patience",
        )
        self._refuse(self.max_steps is not None, "beside max_steps", num_train_epochs="leave max_steps out")
        self._refuse(self.method == "full", "with method 'full'", **dict.fromkeys(_OF_ADAPTERS, "use method 'lora'"))
        self._refuse(
            self.kernels == "on",
            "with kernels 'on', which plan recomputation by memory_gb",
            gradient_checkpointing="use kernels 'auto' or 'off'",
        )
        if self.init_lora_weights == "loftq" and (self.bits != 4 or self.use_dora):
            raise ValueError("init_lora_weights 'loftq' needs a 4-bit base, and LoRA without use_dora")
        self._refuse(not self.train_router, "on frozen routers", router_aux_loss_coef="set train_router")
        tables = [name for name in self.modules_to_save if name.rpartition(".")[2] in TABLES]
        frozen = self.method != "full" and not tables
        self._refuse(frozen, "on frozen embeddings", embedding_learning_rate="add embed_tokens to modules_to_save")
        return self

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if (reason := self.not_sharded_because()) and self.strategy in SHARDED:
            raise ValueError(f"strategy '{self.strategy}' cannot share this training: {reason}; or use strategy 'ddp'")
        if self.kernels == "on" and self.strategy in SHARDED:
            raise ValueError(f"kernels 'on' train no shards: use strategy 'ddp' or 'auto' instead of '{self.strategy}'")
        if self.strategy == "shard" and (self.bits != 4 or self.kernels == "off"):
            found = "kernels are 'off'" if self.kernels == "off" else f"the base has {self.bits} bits"
            raise ValueError(
                f"strategy 'shard' divides a 4-bit base on finemill's kernels, and {found}: use strategy 'fsdp2'"
            )
        if (reason := self.beyond_kernels()) and (self.kernels == "on" or self.strategy == "shard"):
            asked, instead = (
                ("kernels 'on'", "kernels 'auto' or 'off'")
                if self.kernels == "on"
                else ("strategy 'shard'", "strategy 'ddp'")
            )
            raise ValueError(
                f"{asked} cannot train this, as {reason}, which finemill's kernels leave out: use {instead}"
            )
        whole = self.strategy not in ("auto", *SHARDED)
        self._refuse(whole, f"with strategy '{self.strategy}'", offload="use 'fsdp2' or 'zero3'")
        plain = self.strategy not in SHARDED
        self._refuse(plain, f"with strategy '{self.strategy}'", strategy_config="name 'fsdp2', 'zero2' or 'zero3'")
        self._refuse(self.strategy_config is not None, "beside strategy_config", offload="say there where shards wait")
        return self

    def beyond_kernels(self) -> str | None:
        """What of the training the kernels do not cover, whatever the base and the card; None for nothing."""
        reasons = {
            "method is 'full'": self.method == "full",
            "load_in_8bit is on": self.bits == 8,
            "bnb_4bit_quant_type is 'fp4'": self.bits == 4 and self.bnb_4bit_quant_type != "nf4",
            "use_dora is on": self.use_dora,
            "modules_to_save are trained": bool(self.modules_to_save),
            "train_router is on": self.train_router,
            "neftune_noise_alpha is set": self.neftune_noise_alpha is not None,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def not_sharded_because(self) -> str | None:
        """What of the configuration keeps the model from being cut into shards, with what to do; None for nothing."""
        whole_base = self.strategy != "zero2"
        reasons = {
            "optim must be AdamW, 'auto' or 'adamw_torch'": self.optim
            not in ("auto", "adamw_torch", "adamw_torch_fused"),
            "LLM.int8 keeps a weight in one piece, use load_in_4bit": self.bits == 8 and whole_base,
            "use_dora needs the norms of whole weights": self.use_dora and whole_base,
            "a learning rate per kind of weight (loraplus_lr_ratio, embedding_learning_rate)": not (
                self.loraplus_lr_ratio is None and self.embedding_learning_rate is None
            ),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    @property
    def needs_whole_base(self) -> bool:
        """Whether weights of the base are computed or copied before it can be cut into shards."""
        return bool(self.modules_to_save) or self.train_router or self.init_lora_weights == "loftq"

    @property
    def bits(self) -> Literal[4, 8, 16]:
        """Bits per weight of the frozen base's linear layers."""
        if self.method == "full":
            return 16
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else 16

    def _refuse(self, idle: bool, where: str, **instead: str) -> None:
        """Refuse fields that differ from their defaults without effect; `instead` says what else to do, by field."""
        for name, advice in instead.items():
            value = getattr(self, name)
            if idle and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} {value!r} has no effect {where}: leave it out, or {advice}")

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if self.target_modules == ():
            raise ValueError("target_modules is empty: name at least one linear layer or use 'all-linear'")
        names = () if isinstance(self.target_modules, str) else self.target_modules
        if any(name.rpartition(".")[2] == "lm_head" for name in names):
            raise ValueError(
                "target_modules has lm_head, whose adapter TRL's losses would pass by: name other layers, or use "
                "'all-linear', which leaves it out; modules_to_save trains it as a whole"
            )
        return self


ConfigT = TypeVar("ConfigT", bound=LoRATrainingConfig)
