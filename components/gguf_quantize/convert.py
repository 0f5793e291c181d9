"""A Hugging Face model folder as GGUF: architecture, hyperparameters and tensors under llama.cpp's names.

The `gguf` package owns the names of keys and tensors; the mapping of values follows the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from finemill.errors import UserError
from finemill.models.stored_model import read_model_config
from finemill.models.weights import StoredTensor, stored_tensors

Array = NDArray[np.float32]

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


ROPE_FACTORS = "rope_freqs.weight"
# What YaRN means where nothing else is said; llama.cpp computes that and nothing else.
_YARN_DEFAULTS = {
    "attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True,
}  # fmt: skip


_OPTIONAL_WIDTHS = ("num_key_value_heads", "head_dim")
_WIDTHS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    *_OPTIONAL_WIDTHS,
)  # fmt: skip


@dataclass(frozen=True)
class SourceModel:
    """A model folder with safetensors weights, read one tensor at a time.

    `context_length` is the longest context that the file declares; None: the model's own.
    """

    folder: Path
    context_length: int | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` with transformers' defaults."""
        config: dict[str, Any] = read_model_config(self.folder).to_dict()
        return config

    @cached_property
    def architecture(self) -> gguf.MODEL_ARCH:
        """Raises: UserError: a model family that this step does not convert."""
        found = self.config.get("architectures")
        names = found if isinstance(found, list) and found else ["(none)"]
        if names[0] not in ARCHITECTURES:
            raise UserError(
                f"gguf-quantize: architecture {names[0]} in {self.folder / 'config.json'} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        return ARCHITECTURES[names[0]]

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding."""
        return self.files["model.embed_tokens.weight"].shape[0]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return bool(self.config.get("tie_word_embeddings"))

    @cached_property
    def files(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor, in the order of the files."""
        return stored_tensors(self.folder)

    def check(self) -> None:
        """Raises: UserError: the model computes something that llama.cpp has no counterpart for."""
        problem = next(chain(_no_numbers(self.config), _not_in_llama_cpp(self)), None)
        if problem:
            raise UserError(f"gguf-quantize: {self.folder / 'config.json'}: {problem}")
        self.names()

    def _tied(self) -> set[str]:
        return {"lm_head.weight"} if self.ties_embeddings else set()

    def names(self) -> dict[str, str]:
        """GGUF name of every tensor that is written. Raises: UserError: a tensor that llama.cpp has no name for."""
        tensor_map = gguf.get_tensor_name_map(self.architecture, self.num_layers)
        names: dict[str, str] = {}
        for key, tensor in self.files.items():
            # A tied output matrix is the embedding; some folders hold it twice. Old ones hold the rotary frequencies.
            if key in self._tied() or key.endswith("rotary_emb.inv_freq"):
                continue
            name = tensor_map.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"gguf-quantize: no GGUF name for tensor {key} of {tensor.path}")
            if not tensor.is_float:
                raise UserError(
                    f"gguf-quantize: {tensor.path}: {key} has type {tensor.dtype}: pass the unquantized model, as "
                    "merge writes it"
                )
            names[key] = name
        return names

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(GGUF name, shape) of every tensor, in the order of `tensors`, without reading values."""
        for key, name in self.names().items():
            yield name, self.files[key].shape
        if self.rope_factors is not None:
            yield ROPE_FACTORS, self.rope_factors.shape

    def tensors(self, only: Container[str] | None = None) -> Iterator[tuple[str, Array]]:
        """(GGUF name, float32 values) of every tensor, or of those in `only`, read one at a time."""
        for key, name in self.names().items():
            if only is not None and name not in only:
                continue
            with safe_open(self.files[key].path, framework="pt") as file:
                values = file.get_tensor(key).to(torch.float32, copy=True).numpy()
            yield name, self._reorder(key, values)
        if self.rope_factors is not None and (only is None or ROPE_FACTORS in only):
            yield ROPE_FACTORS, self.rope_factors

    def _reorder(self, key: str, values: Array) -> Array:
        """llama.cpp rotates neighbours of a head in the llama family; Hugging Face rotates its two halves."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(key.split(".")[-2])
        if self.architecture != gguf.MODEL_ARCH.LLAMA or heads is None:
            return values
        num_heads = int(self.config.get(heads) or self.config["num_attention_heads"])
        halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    @cached_property
    def rope_factors(self) -> Array | None:
        """Frequency divisors of Llama 3.1's rope scaling, shape (head_dim / 2,), or None without that scaling.

        Source: "The Llama 3 Herd of Models", section 3.4, as in transformers' `rope_type: llama3`.
        """
        rope = self.config["rope_parameters"]
        if rope["rope_type"] != "llama3":
            return None
        old_length = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        frequencies = rope["rope_theta"] ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        wavelengths = 2 * math.pi / frequencies
        smooth = np.clip((old_length / wavelengths - low) / (high - low), 0, 1)
        factors: Array = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
        return factors


def _no_numbers(config: Mapping[str, Any]) -> Iterator[str]:
    """Widths that are none."""
    for key in _WIDTHS:
        value = config.get(key)
        if not (isinstance(value, int) and value > 0) and not (value is None and key in _OPTIONAL_WIDTHS):
            yield f"{key} is {value!r}, and a whole number above 0 is needed: download or copy the model again"


def _not_in_llama_cpp(model: SourceModel) -> Iterator[str]:
    """What of the model's configuration a GGUF file could not say, or llama.cpp would not do."""
    config, rope = model.config, model.config["rope_parameters"]
    if config.get("quantization_config"):
        yield "the weights are quantized: pass the unquantized model, as merge writes it"
    if config["hidden_act"] not in ("silu", "swish"):
        yield f"hidden_act '{config['hidden_act']}' is not supported; llama.cpp computes silu for this family"
    if model.architecture == gguf.MODEL_ARCH.QWEN3 and config.get("attention_bias"):
        yield "attention_bias true is not supported; llama.cpp's Qwen3 has no biases"
    window = config.get("sliding_window")
    # Where layers have types, those say which of them look back no further than the window.
    slides = "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])
    length = model.context_length or config["max_position_embeddings"]
    if window and slides and window < length:
        yield (
            f"sliding_window {window} is not supported: llama.cpp looks back over the whole context in this family. "
            f"Up to {window} tokens both are the same: set context_length to {window}"
        )
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        yield f"rope type '{rope['rope_type']}' is not supported; supported are default, linear, yarn, llama3"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1) != 1:
        yield "partial_rotary_factor is not supported; llama.cpp rotates whole heads in this family"
    if rope["rope_type"] == "yarn":
        for key, default in _YARN_DEFAULTS.items():
            if rope.get(key) not in (None, default) and rope.get(key) != _yarn_attention_factor(key, rope):
                yield f"YaRN's {key} {rope[key]} is not supported; llama.cpp computes with its default"


def _yarn_attention_factor(key: str, rope: Mapping[str, Any]) -> float | None:
    """The factor by which YaRN sharpens attention, where nothing else is said."""
    return 0.1 * math.log(rope["factor"]) + 1 if key == "attention_factor" and rope["factor"] > 1 else None


def add_hyperparameters(writer: gguf.GGUFWriter, model: SourceModel, name: str) -> None:
    """Write what llama.cpp needs to build the graph."""
    config = model.config
    heads = int(config["num_attention_heads"])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(model.context_length or config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(model.num_tokens)
    _add_rope(writer, config["rope_parameters"])


def _add_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
