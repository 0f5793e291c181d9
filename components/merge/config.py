"""Configuration of merge."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from finemill.artifacts.manifest import Reference
from finemill.config import StepConfig
from finemill.errors import UserError


class FurtherAdapter(StepConfig):
    """An adapter that is added beside the step's input."""

    adapter: str
    """Reference of an output of train-qlora or train-dpo, of the same base: plain LoRA."""

    scale: float = 1.0
    """Factor on its part, beside its own lora_alpha; below 0 its change is taken away."""

    @field_validator("adapter")
    @classmethod
    def _check_reference(cls, value: str) -> str:
        try:
            return str(Reference.parse(value))
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if not self.scale:
            raise ValueError("scale 0 leaves the adapter out: take it out of the list")
        return self


class MergeConfig(StepConfig):
    """How the adapter is added to the base, and how closely the result must agree with base and adapter."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the written weights. Default: the base model's own, bfloat16 if that has more than 16 bits. The sum is
    computed in float32 whatever the type, and rounded once."""

    scale: float = Field(default=1.0, gt=0)
    """Factor on the adapter's part, beside its own lora_alpha: 0.5 is the average of base and tuned model."""

    further_adapters: tuple[FurtherAdapter, ...] = ()
    """More adapters on the same base, each with a factor of its own: what is merged is base + scale * adapter + the sum
    of these. Tokenizer, positions and the base in 4 bits are those of the step's input."""

    base: Literal["unquantized", "dequantized"] = "unquantized"
    """What the adapter is added to. `unquantized` is the base itself; `dequantized` is what a training in 4 bits
    computed with, 4-bit values in 16 bits: the model that was trained, with the error that 4 bits have. The result says
    how far the two are from each other under the adapter."""

    max_shard_size: str = Field(default="4GB", pattern=r"^\d+(KB|MB|GB)$")
    """Largest safetensors file; a larger model becomes several, with an index."""

    max_kl: float = Field(default=0.001, gt=0)
    """Largest mean KL divergence, in nats per token, of the written model from base and adapter. Rounding to 16 bits
    costs about 0.00001."""

    min_top1_agreement: float = Field(default=0.95, gt=0, le=1)
    """Smallest share of tokens at which both find the same next token likeliest."""

    max_trained_base_kl: float = Field(default=0.5, gt=0)
    """Largest mean KL divergence, in nats per token, between the base in 4 bits that was trained on and the base
    itself, each with the adapter."""

    merged_4bit: bool = False
    """Write the merged model in bitsandbytes' NF4, too, into the folder `merged_4bit` of the output; the result says
    what that costs. `finemill quantize-4bit` keeps 16 bits where NF4 costs most."""

    max_4bit_kl: float = Field(default=0.5, gt=0)
    """Largest mean KL divergence, in nats per token, of that one from the model in 16 bits."""

    merged_fp8: bool = False
    """Write the merged model in FP8, too, into the folder `merged_fp8` of the output, as vLLM and SGLang read it:
    a scale per output channel, inputs rounded per token. The result says what that costs."""

    max_fp8_kl: float = Field(default=0.05, gt=0)
    """Largest mean KL divergence, in nats per token, of that one from the model in 16 bits."""

    merged_gptq: bool = False
    """Write the merged model in GPTQ's format, 4 bits in groups of 128 inputs, too, into the folder `merged_gptq` of
    the output, as vLLM and SGLang read it. AutoRound (`pip install 'finemill[gptq]'`) rounds it on rows that the
    adapter was trained on, with the model whole in memory. The result says what that costs."""

    gptq_steps: int = Field(default=200, ge=0)
    """Steps in which AutoRound learns how a layer's weights are rounded, for a GPU; 0 weighs errors by the layer's
    inputs alone, in seconds a layer on a CPU."""

    max_gptq_kl: float = Field(default=0.5, gt=0)
    """Largest mean KL divergence, in nats per token, of that one from the model in 16 bits."""

    force: bool = False
    """Merge although nothing shows that the base is the one the adapter was trained on, which the result says, or
    although it has LoRA on a mixture's routers."""
