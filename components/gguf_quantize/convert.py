"""A Hugging Face model folder as GGUF: architecture, hyperparameters and tensors under llama.cpp's names.

The `gguf` package owns the names of keys and tensors; the mapping of values follows the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import re
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

from finemill.components.gguf_quantize.families import (
    GEMMA,
    add_gemma,
    add_long_rope,
    long_rope_factors,
    not_in_gemma,
    rope_of,
    wrong_activation,
)
from finemill.errors import UserError
from finemill.models.rope import scaled_limit
from finemill.models.stored_model import read_model_config
from finemill.models.weights import StoredTensor, holds_another_head, stored_tensors

Array = NDArray[np.float32]

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Gemma3ForConditionalGeneration": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen2MoeForCausalLM": gguf.MODEL_ARCH.QWEN2MOE,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
}
# Whether llama.cpp divides the weights of the chosen experts by their sum.
_NORMALIZES = {gguf.MODEL_ARCH.QWEN2MOE: False, gguf.MODEL_ARCH.QWEN3MOE: True}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Where a model that sees keeps its text model, on the hub and in transformers, and what else it has.
_TEXT_MODEL = re.compile(r"^(model\.)?language_model\.(model\.)?(?!lm_head)")
_TEXT_HEAD = re.compile(r"^language_model\.(?=lm_head)")
_OTHER_PARTS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


_ROPE_FACTORS = "rope_freqs.weight"
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
        """`config.json` with transformers' defaults; of a model that sees, its text model's values."""
        config = read_model_config(self.folder)
        whole: dict[str, Any] = config.to_dict()
        return {**whole, **config.get_text_config().to_dict(), "architectures": whole.get("architectures")}

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
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return int(self.config.get("num_experts") or self.config.get("num_local_experts") or 0)

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return bool(self.config.get("tie_word_embeddings")) and not holds_another_head(self._stored)

    @cached_property
    def files(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor of the text model, in the order of the files, under its name in one that has no eyes."""
        return {text_name(key): tensor for key, tensor in self._stored.items() if not _OTHER_PARTS.match(key)}

    @cached_property
    def _stored(self) -> Mapping[str, StoredTensor]:
        return stored_tensors(self.folder)

    @cached_property
    def _stored_keys(self) -> Mapping[str, str]:
        return {text_name(key): key for key in self._stored}

    def check(self) -> None:
        """Raises: UserError: the model computes something that llama.cpp has no counterpart for."""
        problem = next(chain(_no_numbers(self.config), _not_in_llama_cpp(self)), None)
        if problem:
            raise UserError(f"gguf-quantize: {self.folder / 'config.json'}: {problem}")
        self.names()

    def _tied(self) -> set[str]:
        return {"lm_head.weight"} if self.ties_embeddings else set()

    @cached_property
    def sources(self) -> Mapping[str, tuple[str, ...]]:
        """The stored tensors of every tensor that is written, by its GGUF name: one, or one of each expert.

        Raises: UserError: a tensor that llama.cpp has no name for.
        """
        tensor_map = gguf.get_tensor_name_map(self.architecture, self.num_layers)
        found: dict[str, dict[int, str]] = {}
        for key, tensor in self.files.items():
            # A tied output matrix is the embedding; some folders hold it twice. Old ones hold the rotary frequencies.
            if key in self._tied() or key.endswith("rotary_emb.inv_freq"):
                continue
            name = tensor_map.get_name(_EXPERT.sub(".experts.", key), try_suffixes=(".weight", ".bias"))
            if name is None:
                stacked = ": merge writes a tensor for each expert" if ".experts." in key else ""
                raise UserError(f"gguf-quantize: no GGUF name for tensor {key} of {tensor.path}{stacked}")
            if not tensor.is_float:
                raise UserError(
                    f"gguf-quantize: {tensor.path}: {key} has type {tensor.dtype}: pass the unquantized model, as "
                    "merge writes it"
                )
            expert = _EXPERT.search(key)
            found.setdefault(name, {})[int(expert[1]) if expert else 0] = key
        for name, keys in found.items():
            wanted = set(range(self.num_experts)) if _EXPERT.search(next(iter(keys.values()))) else {0}
            if keys.keys() != wanted:
                raise UserError(
                    f"gguf-quantize: {self.folder} has {len(keys)} experts of {name}, config.json says {len(wanted)}: "
                    "download or copy the model again"
                )
        return {name: tuple(keys[number] for number in sorted(keys)) for name, keys in found.items()}

    def names(self) -> dict[str, str]:
        """GGUF name of every tensor that is written, by its `text_name`. Raises: UserError: as `sources`."""
        return {key: name for name, keys in self.sources.items() for key in keys}

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(GGUF name, shape) of every tensor, in the order of `tensors`, without reading values."""
        for name, keys in self.sources.items():
            shape = self.files[keys[0]].shape
            yield name, (len(keys), *shape) if _EXPERT.search(keys[0]) else shape
        for name, factors in self.rope_factors.items():
            yield name, factors.shape

    def tensors(self, only: Container[str] | None = None) -> Iterator[tuple[str, Array]]:
        """(GGUF name, float32 values) of every tensor, or of those in `only`, read one at a time."""
        for name, keys in self.sources.items():
            if only is not None and name not in only:
                continue
            if _EXPERT.search(keys[0]):
                yield name, np.stack([self._read(key) for key in keys])
            else:
                yield name, self.reorder(keys[0], self._read(keys[0]))
        for name, factors in self.rope_factors.items():
            if only is None or name in only:
                yield name, factors

    def _read(self, key: str) -> Array:
        """Raises: UserError: NaN or infinity."""
        with safe_open(self.files[key].path, framework="pt") as file:
            values: Array = file.get_tensor(self._stored_keys[key]).to(torch.float32, copy=True).numpy()
        if not np.isfinite(values).all():
            raise UserError(
                f"gguf-quantize: {self.files[key].path}: {self._stored_keys[key]} holds NaN or infinity: the training "
                "diverged, or the file is damaged; train, download or merge the model again"
            )
        # Gemma multiplies by one more than what is stored; llama.cpp by what is stored.
        return values + 1 if self.architecture in GEMMA and key.endswith("norm.weight") else values

    def reorder(self, key: str, values: Array) -> Array:
        """`values`, with an entry per row of tensor `key`, in the order of llama.cpp's rows.

        llama.cpp rotates neighbours of a head in the llama family; Hugging Face rotates its two halves.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(key.split(".")[-2])
        if self.architecture != gguf.MODEL_ARCH.LLAMA or heads is None:
            return values
        num_heads = int(self.config.get(heads) or self.config["num_attention_heads"])
        halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    @cached_property
    def rope_factors(self) -> Mapping[str, Array]:
        """Divisors of the rotary frequencies by tensor name, each of shape (rotated width / 2,); without them, none."""
        return _llama_3_factors(self) or long_rope_factors(self.config)


def text_name(name: str) -> str:
    """The name of a tensor or parameter in a model of text alone."""
    return _TEXT_HEAD.sub("", _TEXT_MODEL.sub("model.", name))


def _llama_3_factors(model: SourceModel) -> dict[str, Array]:
    """Those of Llama 3.1: "The Llama 3 Herd of Models", section 3.4, as in transformers' `rope_type: llama3`."""
    rope = rope_of(model.config)
    if rope["rope_type"] != "llama3":
        return {}
    old_length = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** -(np.arange(0, model.head_dim, 2) / model.head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((old_length / wavelengths - low) / (high - low), 0, 1)
    return {_ROPE_FACTORS: (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)}


def _no_numbers(config: Mapping[str, Any]) -> Iterator[str]:
    """Widths that are none."""
    for key in _WIDTHS:
        value = config.get(key)
        if not (isinstance(value, int) and value > 0) and not (value is None and key in _OPTIONAL_WIDTHS):
            yield f"{key} is {value!r}, and a whole number above 0 is needed: download or copy the model again"


def _not_in_llama_cpp(model: SourceModel) -> Iterator[str]:
    """What of the model's configuration a GGUF file could not say, or llama.cpp would not do."""
    config = model.config
    if config.get("quantization_config"):
        yield "the weights are quantized: pass the unquantized model, as merge writes it"
    if problem := wrong_activation(model):
        yield problem
    without_bias = (gguf.MODEL_ARCH.QWEN3, gguf.MODEL_ARCH.QWEN3MOE, *GEMMA)
    if model.architecture in without_bias and config.get("attention_bias"):
        yield "attention_bias true is not supported; llama.cpp has no biases in this family"
    heads = int(config["num_attention_heads"])
    if model.architecture == gguf.MODEL_ARCH.QWEN2 and model.head_dim * heads != config["hidden_size"]:
        yield (
            f"{heads} heads of width {model.head_dim} are not supported: llama.cpp wants hidden_size "
            f"({config['hidden_size']}) shared out among them in this family"
        )
    if model.num_experts:
        yield from _experts_not_in_llama_cpp(model)
    if model.architecture in GEMMA:
        yield from not_in_gemma(model)
    else:
        yield from _window_not_in_llama_cpp(model)
    yield from _rope_not_in_llama_cpp(model)
    yield from _length_beyond_the_model(model)


def _window_not_in_llama_cpp(model: SourceModel) -> Iterator[str]:
    window = model.config.get("sliding_window")
    # Where layers have types, those say which of them look back no further than the window.
    slides = "sliding_attention" in (model.config.get("layer_types") or ["sliding_attention"])
    if window and slides and window < _context_length(model):
        yield (
            f"sliding_window {window} is not supported: llama.cpp looks back over the whole context in this family. "
            f"Up to {window} tokens both are the same: set context_length to {window}"
        )


def _rope_not_in_llama_cpp(model: SourceModel) -> Iterator[str]:
    rope, is_phi = rope_of(model.config), model.architecture == gguf.MODEL_ARCH.PHI3
    supported = ("default", "longrope") if is_phi else ("default", "linear", "yarn")
    if model.architecture == gguf.MODEL_ARCH.LLAMA:
        supported = *supported, "llama3"
    if rope["rope_type"] not in supported:
        yield (f"rope type '{rope['rope_type']}' is not supported; supported in this family are {', '.join(supported)}")
    if not is_phi and rope.get("partial_rotary_factor", model.config.get("partial_rotary_factor") or 1) != 1:
        yield "partial_rotary_factor is not supported; llama.cpp rotates whole heads in this family"
    if rope["rope_type"] == "yarn":
        for key, default in _YARN_DEFAULTS.items():
            if rope.get(key) not in (None, default) and rope.get(key) != _yarn_attention_factor(key, rope):
                yield f"YaRN's {key} {rope[key]} is not supported; llama.cpp computes with its default"


def _experts_not_in_llama_cpp(model: SourceModel) -> Iterator[str]:
    config, normalizes = model.config, _NORMALIZES.get(model.architecture)
    if normalizes is not None and bool(config.get("norm_topk_prob")) != normalizes:
        yield (
            f"norm_topk_prob {config.get('norm_topk_prob')} is not supported; llama.cpp computes as with {normalizes} "
            "in this family"
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield "layers without experts (mlp_only_layers, decoder_sparse_step) are not supported; llama.cpp wants none"


def _length_beyond_the_model(model: SourceModel) -> Iterator[str]:
    own = _own_context_length(model)
    if model.context_length and model.context_length > own:
        yield f"context_length {model.context_length} is more than the model's {own} positions: set it to {own} or less"


def _context_length(model: SourceModel) -> int:
    """Positions that a client of the file may use."""
    return model.context_length or _own_context_length(model)


def _own_context_length(model: SourceModel) -> int:
    """All the positions that the model has, those of a scaling included."""
    # Gemma's configuration states the scaled ones.
    rope = {} if model.architecture in GEMMA else model.config["rope_parameters"]
    return scaled_limit(model.config["max_position_embeddings"], rope)


def _yarn_attention_factor(key: str, rope: Mapping[str, Any]) -> float | None:
    """The factor by which YaRN sharpens attention, where nothing else is said."""
    return 0.1 * math.log(rope["factor"]) + 1 if key == "attention_factor" and rope["factor"] > 1 else None


def add_hyperparameters(writer: gguf.GGUFWriter, model: SourceModel, name: str) -> None:
    """Write what llama.cpp needs to build the graph."""
    config = model.config
    heads = int(config["num_attention_heads"])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(_context_length(model))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    rope = rope_of(config)
    writer.add_rope_dimension_count(int(model.head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(model.num_tokens)
    if model.num_experts:
        _add_experts(writer, model)
    if model.architecture in GEMMA:
        add_gemma(writer, model)
    _add_rope(writer, rope)
    if rope["rope_type"] == "longrope":
        add_long_rope(writer, config)


def _add_experts(writer: gguf.GGUFWriter, model: SourceModel) -> None:
    config = model.config
    writer.add_expert_count(model.num_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
