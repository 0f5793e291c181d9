"""Configuration of gguf-quantize."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator

from finemill.config import StepConfig

Quantization = Literal["F16", "Q8_0", "Q4_K_M"]

MAX_KL: Mapping[Quantization, float] = {"F16": 0.01, "Q8_0": 0.02, "Q4_K_M": 0.5}
"""Nats per token by which a file may differ from the merged model where the configuration says nothing."""


class GGUFQuantizeConfig(StepConfig):
    """Which files to write, and how closely each is compared with the merged model."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of the file names, `<name>-Q4_K_M.gguf`. Default: the base model's name with `-tuned`."""

    quantizations: tuple[Quantization, ...] = Field(default=("F16", "Q8_0", "Q4_K_M"), min_length=1)
    """Files to write: F16 keeps every weight, Q8_0 is half and Q4_K_M about a third of its size."""

    imatrix: bool = False
    """Weigh each input channel by how strongly the training rows excite it when rounding to 4 and 6 bits: smaller
    error on such text, for a forward pass over `imatrix_rows` rows."""

    imatrix_rows: int = Field(default=64, ge=1)
    """Training rows that the channel weights come from."""

    context_length: int | None = Field(default=None, ge=1)
    """Longest context, in tokens, that the files declare. Default: the model's own. A model with a sliding window is
    the same in llama.cpp up to that window."""

    verify_rows: int = Field(default=64, ge=0)
    """Held-out problems that each file answers, greedily, in llama.cpp. More rows narrow the error of `exact_match`; 0
    leaves the answers out."""

    kl_rows: int = Field(default=12, ge=1)
    """Held-out rows whose next-token distributions are compared with the merged model's."""

    kl_positions: int = Field(default=6, ge=1)
    """Positions compared in each of those rows, evenly spread over the assistant's last turn."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""

    max_kl: dict[Quantization, float] = Field(default_factory=dict)
    """Largest mean KL divergence, in nats per token, of a file from the merged model, by quantization; a file beyond
    it ends the step. Default: F16 0.01, Q8_0 0.02, Q4_K_M 0.5, a few times what rounding costs small models."""

    max_points_lost: float = Field(default=5.0, ge=0, le=100)
    """Percentage points of exact match that a file may lose against the merged model before that is said in a
    warning, or with `strict` ends the step."""

    strict: bool = False
    """Fail when a file loses more than `max_points_lost`."""

    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for quantization and llama.cpp. Default: one per core that the process may use; one for models so
    small that threads would only wait for each other."""

    def allowed_kl(self, quantization: Quantization) -> float:
        """Nats per token by which a file may differ from the merged model."""
        return self.max_kl.get(quantization, MAX_KL[quantization])

    @field_validator("quantizations")
    @classmethod
    def _each_once(cls, value: tuple[Quantization, ...]) -> tuple[Quantization, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"each quantization once, found {', '.join(value)}")
        return value
