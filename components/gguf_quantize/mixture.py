"""Which type each tensor of a file gets: llama.cpp's rules for every quantization.

A mixture is a base type and exceptions: matrices that a rounding error shows most in (output, embedding, value,
feed-forward-down, attention output) get more bits, most of all in the layers that matter most (the first and the last
eighth, every third between). Source: `llama_tensor_get_type` in llama.cpp's llama-quant.cpp.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from finemill.components.gguf_quantize.config import Quantization

# When the row length is no multiple of 256, llama.cpp takes the type of 32 that is next in size.
_FALLBACK = {
    Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
    **dict.fromkeys((Type.Q2_K, Type.Q3_K, Type.TQ1_0, Type.TQ2_0), Type.Q4_0),
    **dict.fromkeys(
        (Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS),
        Type.IQ4_NL,
    ),
}  # fmt: skip
_BASE: Mapping[Quantization, Type] = {
    "F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16, "Q8_0": Type.Q8_0, "Q6_K": Type.Q6_K,
    "Q5_K_M": Type.Q5_K, "Q5_K_S": Type.Q5_K, "Q5_1": Type.Q5_1, "Q5_0": Type.Q5_0,
    "Q4_K_M": Type.Q4_K, "Q4_K_S": Type.Q4_K, "Q4_1": Type.Q4_1, "Q4_0": Type.Q4_0,
    "IQ4_NL": Type.IQ4_NL, "IQ4_XS": Type.IQ4_XS, "Q3_K_L": Type.Q3_K, "Q3_K_M": Type.Q3_K, "Q3_K_S": Type.Q3_K,
    "IQ3_M": Type.IQ3_S, "IQ3_S": Type.IQ3_S, "IQ3_XS": Type.IQ3_S, "IQ3_XXS": Type.IQ3_XXS,
    "Q2_K_L": Type.Q2_K, "Q2_K": Type.Q2_K, "Q2_K_S": Type.Q2_K, "IQ2_M": Type.IQ2_S, "IQ2_S": Type.IQ2_XS,
    "IQ2_XS": Type.IQ2_XS, "IQ2_XXS": Type.IQ2_XXS, "IQ1_M": Type.IQ1_M, "IQ1_S": Type.IQ1_S,
    "TQ2_0": Type.TQ2_0, "TQ1_0": Type.TQ1_0, "MXFP4_MOE": Type.MXFP4,
}  # fmt: skip
_UNROUNDED = ("F32", "F16", "BF16")
_WITH_EIGHT_EXPERTS = (
    "Q2_K", "Q2_K_L", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip
"""Quantizations in which the attention's output has five bits, where a layer has eight experts."""
_SMALLEST = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")


@dataclass(frozen=True)
class ModelShape:
    """What the rules ask about a model."""

    num_layers: int
    heads_per_kv_head: int
    ties_embeddings: bool
    has_imatrix: bool = False
    num_experts: int = 0


@dataclass(frozen=True)
class TensorType:
    """The type a tensor gets, and the one the mixture wanted where its row length does not allow that."""

    type: Type
    wanted: Type

    @property
    def fell_back(self) -> bool:
        """Whether the row length forbade the wanted type."""
        return bool(self.type != self.wanted)


def tensor_type(name: str, shape: tuple[int, ...], quantization: Quantization, model: ModelShape) -> TensorType:
    """The type of the tensor `name` (GGUF name; `shape` as in PyTorch, rows first) in a file of `quantization`."""
    # Routers are small, and an error there sends tokens to other experts.
    if len(shape) < 2 or name.endswith("_norm.weight") or "ffn_gate_inp" in name:
        return TensorType(Type.F32, Type.F32)
    wanted = _wanted(name, quantization, model)
    # The output matrix gets eight bits then, whichever K-quant it was to be.
    stands_in = Type.Q6_K if wanted == Type.Q5_K and _is_output(name, model) and shape[-1] % 256 else wanted
    return TensorType(_allowed(stands_in, shape[-1]), wanted)


def _is_output(name: str, model: ModelShape) -> bool:
    return name == "output.weight" or (model.ties_embeddings and name == "token_embd.weight")


def _wanted(name: str, quantization: Quantization, model: ModelShape) -> Type:
    base = _BASE[quantization]
    if quantization in _UNROUNDED:
        return base
    if quantization == "MXFP4_MOE":
        return base if "_exps." in name else Type.Q8_0
    if _is_output(name, model):
        return _output(quantization, base)
    if name == "token_embd.weight":
        return _embedding(quantization, base)
    block = re.match(
        r"blk\.(\d+)\.(attn_v|attn_k|attn_qkv|attn_q|attn_output|ffn_down|ffn_gate|ffn_up)(_exps|_shexp)?\.weight$",
        name,
    )
    if block is None:
        return base
    if quantization in _SMALLEST:
        return _in_smallest(block[2], int(block[1]), quantization, model)
    return _in_block(block[2], int(block[1]), quantization, model)


def _output(quantization: Quantization, base: Type) -> Type:
    if base == Type.Q8_0 or quantization == "Q2_K_L":
        return Type.Q8_0
    return Type.Q5_K if quantization in (*_SMALLEST, "IQ3_XXS") else Type.Q6_K


def _embedding(quantization: Quantization, base: Type) -> Type:
    if quantization in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return Type.Q2_K
    if quantization in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return Type.IQ3_S
    return {"TQ1_0": Type.Q4_K, "TQ2_0": Type.Q4_K, "Q2_K_L": Type.Q8_0}.get(quantization, base)


def _in_smallest(part: str, layer: int, quantization: Quantization, model: ModelShape) -> Type:
    """The rules for files of one and two bits."""
    more = Type.IQ3_S if quantization in ("IQ2_S", "IQ2_M") else Type.Q2_K
    if part == "attn_v":
        return Type.Q4_K if model.heads_per_kv_head >= 4 or model.num_experts >= 4 else more
    if model.num_experts == 8 and part in ("attn_k", "attn_output"):
        return {"attn_k": Type.Q4_K, "attn_output": Type.Q5_K}[part]
    if part == "ffn_down" and layer < model.num_layers // 8:
        return more
    if part == "attn_output" and quantization in ("IQ1_S", "IQ1_M"):
        return Type.IQ2_XXS
    if part == "attn_output" and quantization in ("IQ2_S", "IQ2_M"):
        return Type.IQ3_S
    return _BASE[quantization]


def _in_block(part: str, layer: int, quantization: Quantization, model: ModelShape) -> Type:
    base = _BASE[quantization]
    # Beside eight large experts, attention is so small that more bits cost next to nothing.
    if model.num_experts == 8 and part in ("attn_v", "attn_k"):
        return Type.Q8_0
    if model.num_experts == 8 and part == "attn_output":
        return Type.Q5_K if quantization in _WITH_EIGHT_EXPERTS else base
    if part == "attn_v":
        return _value(layer, quantization, model)
    if part == "ffn_down":
        return _down(layer, quantization, model)
    if part == "attn_output":
        exceptions = {
            "Q2_K": Type.Q3_K, "Q2_K_L": Type.Q3_K, "IQ3_XXS": Type.IQ3_S, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K,
            "IQ3_M": Type.Q4_K,
        }  # fmt: skip
        return exceptions.get(quantization, base)
    if part == "attn_qkv":
        more = {"Q4_K_M": Type.Q5_K, "Q5_K_M": Type.Q6_K, **dict.fromkeys(("Q3_K_M", "Q3_K_L", "IQ3_M"), Type.Q4_K)}
        return more.get(quantization, base)
    if part in ("attn_q", "attn_k"):
        return {"IQ3_XS": Type.IQ3_XXS, "IQ3_XXS": Type.IQ2_S}.get(quantization, base)
    middle = model.num_layers // 8 <= layer < 7 * model.num_layers // 8
    return Type.IQ3_XXS if quantization == "IQ3_XS" and middle else base


def _value(layer: int, quantization: Quantization, model: ModelShape) -> Type:
    """Where several heads share this matrix, more bits cost next to nothing."""
    chosen, shared = _BASE[quantization], model.heads_per_kv_head >= 4
    if quantization in ("Q2_K", "Q2_K_L"):
        chosen = Type.Q4_K if shared else Type.Q3_K
    elif quantization == "IQ3_XXS":
        chosen = Type.Q4_K if shared else Type.IQ3_XXS if model.has_imatrix else Type.IQ3_S
    elif quantization == "IQ3_M" or (shared and quantization in ("Q2_K_S", "IQ3_XS", "IQ3_S")):
        chosen = Type.Q4_K
    elif quantization == "Q3_K_M":
        chosen = Type.Q5_K if layer < 2 else Type.Q4_K
    elif quantization == "Q3_K_L" or (shared and quantization in ("IQ4_NL", "IQ4_XS")):
        chosen = Type.Q5_K
    elif quantization in ("Q4_K_M", "Q5_K_M") and _matters_more(layer, model.num_layers):
        chosen = Type.Q6_K
    elif quantization == "Q4_K_S" and layer < 4:
        chosen = Type.Q5_K
    # llama.cpp's "70B" rule.
    return Type.Q5_K if chosen in (Type.Q3_K, Type.Q4_K) and model.num_layers == 80 else chosen


def _down(layer: int, quantization: Quantization, model: ModelShape) -> Type:
    first = layer < model.num_layers // 8
    if quantization == "Q3_K_M":
        return Type.Q5_K if layer < model.num_layers // 16 else Type.Q4_K
    if quantization in ("Q4_K_M", "Q5_K_M"):
        return Type.Q6_K if _matters_more(layer, model.num_layers) else _BASE[quantization]
    if quantization == "IQ3_M" and model.num_experts == 8 and _matters_more(layer, model.num_layers):
        return Type.Q4_K
    if quantization == "IQ3_XXS" and not model.has_imatrix:
        return Type.Q4_K if first else Type.Q3_K
    everywhere = {"Q2_K": Type.Q3_K, "Q2_K_L": Type.Q3_K, "Q3_K_L": Type.Q5_K}
    in_first = {"Q2_K_S": Type.Q4_K, "IQ3_M": Type.Q4_K, "Q4_K_S": Type.Q5_K}
    in_first |= {"Q4_0": Type.Q4_1, "Q5_0": Type.Q5_1} if model.has_imatrix else {}
    in_first |= {} if model.has_imatrix else {"IQ4_NL": Type.Q5_K, "IQ4_XS": Type.Q5_K}
    chosen = everywhere.get(quantization, _BASE[quantization])
    return in_first.get(quantization, chosen) if first else chosen


def _matters_more(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _allowed(wanted: Type, row_length: int) -> Type:
    chosen = wanted
    while chosen not in (Type.F32, Type.F16) and row_length % GGML_QUANT_SIZES[chosen][0]:
        chosen = _FALLBACK.get(chosen, Type.F16)
    return chosen
