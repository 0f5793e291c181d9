"""What single families compute otherwise than the others: Gemma 2 and 3, Phi-3 and Phi-4.

llama.cpp builds these graphs with numbers of its own where the file has no key for them: a model with others is refused
by name.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from finemill.components.gguf_quantize.convert import SourceModel

GEMMA = (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3)
_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_SILU = ("silu", "swish")
# Every how many layers one looks back over the whole context, and the layers of the size whose heads are scaled by the
# model's width instead of their own.
_FULL_EVERY = {gguf.MODEL_ARCH.GEMMA2: 2, gguf.MODEL_ARCH.GEMMA3: 6}
_LAYERS_OF_27B = {gguf.MODEL_ARCH.GEMMA2: 46, gguf.MODEL_ARCH.GEMMA3: 62}
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scaling of positions; of a model that has several, of the layers that look back over the whole context."""
    rope: Mapping[str, Any] = config["rope_parameters"]
    own: Mapping[str, Any] = rope.get("full_attention", rope)
    return own


def wrong_activation(model: "SourceModel") -> str | None:
    """What llama.cpp computes instead, if the model's activation is another."""
    is_gemma = model.architecture in GEMMA
    found = model.config["hidden_activation" if is_gemma else "hidden_act"]
    if found in (_GELU if is_gemma else _SILU):
        return None
    return (
        f"hidden_act '{found}' is not supported; llama.cpp computes {'gelu (tanh)' if is_gemma else 'silu'} for this "
        "family"
    )


def not_in_gemma(model: "SourceModel") -> Iterator[str]:
    """What of a Gemma a file could not say."""
    config, period = model.config, _FULL_EVERY[model.architecture]
    types = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(model.num_layers)
    ]
    if config.get("layer_types") != types:
        yield f"layer_types are not supported; llama.cpp lets every {period}th layer look back over the whole context"
    if config.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention is not supported; llama.cpp looks back only"
    width = config["hidden_size"] / config["num_attention_heads"]
    wanted = width if model.num_layers == _LAYERS_OF_27B[model.architecture] else model.head_dim
    if not math.isclose(config["query_pre_attn_scalar"], wanted):
        yield (
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']} is not supported; llama.cpp computes with "
            f"{wanted:g} for {model.num_layers} layers"
        )
    is_2 = model.architecture == gguf.MODEL_ARCH.GEMMA2
    for key in ("attn_logit_softcapping", "final_logit_softcapping") if is_2 else ():
        if not config.get(key):
            yield f"{key} {config.get(key)} is not supported; llama.cpp caps logits in this family"
    if not is_2 and config.get("attn_logit_softcapping"):
        yield "attn_logit_softcapping is not supported; llama.cpp does not cap them in this family"
    sliding = config["rope_parameters"].get("sliding_attention", {"rope_type": "default"})
    if sliding["rope_type"] != "default":
        yield f"rope type '{sliding['rope_type']}' of sliding layers is not supported; llama.cpp scales none of them"
    if is_2 and rope_of(config)["rope_type"] != "default":
        yield f"rope type '{rope_of(config)['rope_type']}' is not supported in this family"


def add_gemma(writer: gguf.GGUFWriter, model: "SourceModel") -> None:
    """Caps of logits, the window, and the frequencies of the layers that have it."""
    config = model.config
    writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "sliding_attention" in config["rope_parameters"]:
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def long_rope_factors(config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Divisors of the frequencies of Phi's LongRoPE, for contexts up to the original length and beyond."""
    rope = rope_of(config)
    if rope["rope_type"] != "longrope":
        return {}
    return {
        name: np.array(rope[key], dtype=np.float32) for name, key in ((_LONG, "long_factor"), (_SHORT, "short_factor"))
    }


def add_long_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """The original length, and the factor by which attention is sharpened.

    Source: "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", as in transformers' `rope_type: longrope`.
    """
    rope = rope_of(config)
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    sharper = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or sharper)
