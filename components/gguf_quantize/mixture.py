"""Which type each tensor of a file gets: llama.cpp's rules for F16, Q8_0 and Q4_K_M.

Q4_K_M keeps the output matrix, and the value and feed-forward-down matrices of the layers that matter most (the first
and the last eighth, every third between), in six bits. Source: `llama_tensor_get_type` in llama.cpp's llama-quant.cpp.
"""

import re
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from finemill.components.gguf_quantize.config import Quantization

# When the row length is no multiple of 256, llama.cpp takes the type of 32 that is next in size.
_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0, Type.Q5_K: Type.Q5_1, Type.Q8_0: Type.F16}


@dataclass(frozen=True)
class TensorType:
    """The type a tensor gets, and the one the mixture wanted where its row length does not allow that."""

    type: Type
    wanted: Type

    @property
    def fell_back(self) -> bool:
        """Whether the row length forbade the wanted type."""
        return bool(self.type != self.wanted)


def tensor_type(
    name: str, shape: tuple[int, ...], quantization: Quantization, num_layers: int, *, ties_embeddings: bool
) -> TensorType:
    """The type of the tensor `name` (GGUF name; `shape` as in PyTorch, rows first) in a file of `quantization`."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return TensorType(Type.F32, Type.F32)
    if quantization == "F16":
        return TensorType(Type.F16, Type.F16)
    is_output = name == "output.weight" or (ties_embeddings and name == "token_embd.weight")
    wanted = Type.Q8_0 if quantization == "Q8_0" else _q4_k_m(name, num_layers, is_output=is_output)
    return TensorType(_allowed(wanted, shape[-1]), wanted)


def _q4_k_m(name: str, num_layers: int, *, is_output: bool) -> Type:
    if is_output:
        return Type.Q6_K
    block = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight$", name)
    if block and _matters_more(int(block[1]), num_layers):
        return Type.Q6_K
    # llama.cpp's "70B" rule: eight heads share this matrix, so that more bits cost next to nothing.
    if block and block[2] == "attn_v" and num_layers == 80:
        return Type.Q5_K
    return Type.Q4_K


def _matters_more(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _allowed(wanted: Type, row_length: int) -> Type:
    chosen = wanted
    while chosen != Type.F16 and row_length % GGML_QUANT_SIZES[chosen][0]:
        chosen = _FALLBACK.get(chosen, Type.F16)
    return chosen
