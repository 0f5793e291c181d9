"""Configuration of merge."""

from typing import Literal

from pydantic import Field

from finemill.config import StepConfig


class MergeConfig(StepConfig):
    """How the adapter is added to the base, and how closely the result must agree with base and adapter."""

    dtype: Literal["bfloat16", "float16"] | None = None
    """Type of the written weights. Default: the base model's own, bfloat16 if that has more than 16 bits."""

    compute_dtype: Literal["float32", "dtype"] = "float32"
    """Type in which base and adapter are added: `float32` rounds once, at the end, and takes 4 bytes of memory per
    parameter; `dtype` (that of the result) takes half and rounds twice."""

    max_shard_size: str = Field(default="4GB", pattern=r"^\d+(KB|MB|GB)$")
    """Largest safetensors file; a larger model becomes several, with an index."""

    max_kl: float = Field(default=0.001, gt=0)
    """Largest mean KL divergence, in nats per token, of the written model from base and adapter. Rounding to 16 bits
    costs about 0.00001; computing in 16 bits (`compute_dtype`) about a hundred times that."""

    min_top1_agreement: float = Field(default=0.95, gt=0, le=1)
    """Smallest share of tokens at which both find the same next token likeliest."""
