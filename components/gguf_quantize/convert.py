"""A Hugging Face model folder as GGUF: architecture, hyperparameters and tensors under llama.cpp's names.

The `gguf` package owns the names of keys and tensors; the mapping of values follows the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from finemill.errors import UserError

Array = NDArray[np.float32]

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class SourceModel:
    """A model folder with safetensors weights, read one tensor at a time."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config

    @cached_property
    def architecture(self) -> gguf.MODEL_ARCH:
        """Raises: UserError: a model family that this step does not convert."""
        names = self.config.get("architectures") or ["(none)"]
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
    def head_dim(self) -> int:
        """Width of one attention head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return bool(self.config.get("tie_word_embeddings"))

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Where each tensor lies, in the order of the files."""
        placed: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                placed.update(dict.fromkeys(file.keys(), path))
        if not placed:
            raise UserError(f"gguf-quantize: no safetensors file in {self.folder}: merge writes them")
        return placed

    def names(self) -> dict[str, str]:
        """GGUF name of every tensor that is written. Raises: UserError: a tensor that llama.cpp has no name for."""
        tensor_map = gguf.get_tensor_name_map(self.architecture, self.num_layers)
        names: dict[str, str] = {}
        for key, path in self.files.items():
            # A tied output matrix is the embedding; some folders hold it twice.
            if key == "lm_head.weight" and self.ties_embeddings:
                continue
            name = tensor_map.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"gguf-quantize: no GGUF name for tensor {key} of {path.name}")
            names[key] = name
        return names

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(GGUF name, shape) of every tensor, in the order of `tensors`, without reading values."""
        for key, name in self.names().items():
            yield name, tuple(self._file(key).get_slice(key).get_shape())
        if self.rope_factors is not None:
            yield ROPE_FACTORS, self.rope_factors.shape

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """(GGUF name, float32 values) of every tensor, read one at a time."""
        for key, name in self.names().items():
            yield name, self._reorder(key, self._file(key).get_tensor(key).to(torch.float32).numpy())
        if self.rope_factors is not None:
            yield ROPE_FACTORS, self.rope_factors

    def _file(self, key: str) -> Any:
        path = self.files[key]
        if path not in self._open_files:
            self._open_files[path] = safe_open(path, framework="pt")
        return self._open_files[path]

    @cached_property
    def _open_files(self) -> dict[Path, Any]:
        """Files mapped into memory so far."""
        return {}

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
        rope = rope_parameters(self.config)
        if rope["rope_type"] != "llama3":
            return None
        old_length = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        frequencies = rope["rope_theta"] ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        wavelengths = 2 * math.pi / frequencies
        smooth = np.clip((old_length / wavelengths - low) / (high - low), 0, 1)
        factors: Array = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
        return factors


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the scaling's own values, from either of transformers' two spellings."""
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    rope |= {key: value for key, value in (config.get("rope_scaling") or {}).items() if value is not None}
    rope |= config.get("rope_parameters") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise UserError(
            f"gguf-quantize: rope type '{rope['rope_type']}' is not supported: default, linear, yarn, llama3"
        )
    return rope


def add_hyperparameters(writer: gguf.GGUFWriter, model: SourceModel, name: str) -> None:
    """Write what llama.cpp needs to build the graph."""
    config = model.config
    heads = int(config["num_attention_heads"])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_rope(writer, rope_parameters(config))


def _add_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
