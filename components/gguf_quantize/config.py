"""Configuration of gguf-quantize."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from finemill.config import StepConfig

ALIASES: Mapping[str, str] = {
    "NOT_QUANTIZED": "F16", "FAST_QUANTIZED": "Q8_0", "QUANTIZED": "Q4_K_M", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M", "Q3_K_XS": "IQ3_XS", "FP16": "F16", "FP32": "F32",
    "MXFP4": "MXFP4_MOE",
}  # fmt: skip
"""Other names of quantizations: Unsloth's, and llama.cpp's short ones."""


DYNAMIC = "DYNAMIC_"
"""What precedes the size of a file whose types are chosen per tensor."""


def _canonical(name: object) -> object:
    """llama.cpp's spelling of a quantization's name."""
    if not isinstance(name, str):
        return name
    upper = name.strip().upper().replace("-", "_")
    size = upper.removeprefix(DYNAMIC)
    return upper[: len(upper) - len(size)] + ALIASES.get(size, size)


Quantization = Annotated[
    Literal[
        "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
        "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K_L", "Q2_K",
        "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
        "MXFP4_MOE",
        "DYNAMIC_Q6_K", "DYNAMIC_Q5_K_M", "DYNAMIC_Q5_K_S", "DYNAMIC_Q4_K_M", "DYNAMIC_Q4_K_S", "DYNAMIC_IQ4_XS",
        "DYNAMIC_Q3_K_L", "DYNAMIC_Q3_K_M", "DYNAMIC_Q3_K_S",
    ],
    BeforeValidator(_canonical),
]  # fmt: skip

NEED_IMATRIX = frozenset(
    {"Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)  # fmt: skip
"""Quantizations that llama.cpp does not write without an importance matrix."""

_MAX_KL = {32: 0.01, 16: 0.01, 8: 0.02, 6: 0.05, 5: 0.2, 4: 0.5, 3: 1.0, 2: 3.0, 1: 5.0}
# Times `max_points_lost`, where a type of so few bits is known to cost more.
_POINTS_FACTOR = {3: 4, 2: 20, 1: 20}
# Ternary types are for models that were trained with ternary weights: of those they lose nothing.
_MAX_KL_TERNARY = 0.1


def size_of(quantization: Quantization) -> Quantization:
    """The quantization whose size a dynamic one keeps to; any other itself."""
    size: Quantization = quantization.removeprefix(DYNAMIC)  # type: ignore[assignment]
    return size


def _bits(quantization: Quantization) -> int:
    return int("".join(char for char in size_of(quantization).partition("_")[0] if char.isdecimal()))


class GGUFQuantizeConfig(StepConfig):
    """Which files to write, and how closely each is compared with the merged model."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of the file names, `<name>-Q4_K_M.gguf`. Default: the base model's name with `-tuned`."""

    quantizations: tuple[Quantization, ...] = Field(default=("F16", "Q8_0", "Q4_K_M"), min_length=1)
    """Files to write, in llama.cpp's names or Unsloth's, in any case: F16 keeps every weight, Q8_0 is half and Q4_K_M
    about a third of its size. IQ types are smaller at the same error and slower; TQ types are for ternary models,
    MXFP4_MOE for mixtures of experts. `dynamic-Q4_K_M` is as large as Q4_K_M and closer to the merged model: each
    tensor's type is chosen by its measured error on the training rows."""

    imatrix: bool = False
    """Weigh each input channel by how strongly the training rows excite it when rounding: smaller error on such text,
    for a forward pass over `imatrix_rows` rows. Always so where a dynamic file, Q2_K_S, IQ3_XS, IQ3_XXS or
    a type of one or two IQ bits is written."""

    imatrix_rows: int = Field(default=64, ge=1)
    """Training rows that the channel weights, and the errors of dynamic files, come from."""

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
    it ends the step. Default, a few times what rounding costs small models: 0.01 for 16 bits, 0.02 for 8, 0.05, 0.2,
    0.5, 1, 3 for 6 to 2, 5 for 1, 0.1 for TQ types."""

    max_points_lost: float = Field(default=5.0, ge=0, le=100)
    """Percentage points of exact match that a file may lose against the merged model before that is said in a
    warning, or with `strict` ends the step. It ends the step in any case where it is no chance: where the 95 % interval
    of the loss on the same problems lies beyond it; four times as much for 3 bits, twenty times for 2 and 1."""

    strict: bool = False
    """Fail when a file loses more than `max_points_lost`."""

    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads for quantization and llama.cpp. Default: one per core that the process may use; one for models so
    small that threads would only wait for each other."""

    def allowed_kl(self, quantization: Quantization) -> float:
        """Nats per token by which a file may differ from the merged model."""
        if quantization in self.max_kl:
            return self.max_kl[quantization]
        return _MAX_KL_TERNARY if quantization.startswith("TQ") else _MAX_KL[_bits(quantization)]

    def allowed_points(self, quantization: Quantization) -> float:
        """Percentage points of exact match that a file may surely lose."""
        return self.max_points_lost * _POINTS_FACTOR.get(_bits(quantization), 1)

    @property
    def needs_imatrix(self) -> bool:
        """Whether the importance of input channels is measured."""
        return self.imatrix or self.is_dynamic or not NEED_IMATRIX.isdisjoint(self.quantizations)

    @property
    def is_dynamic(self) -> bool:
        """Whether any file's types are chosen by measured error."""
        return any(quantization.startswith(DYNAMIC) for quantization in self.quantizations)

    @field_validator("quantizations")
    @classmethod
    def _each_once(cls, value: tuple[Quantization, ...]) -> tuple[Quantization, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"each quantization once, found {', '.join(value)}")
        return value
