"""Widths of published models by name: what `finemill estimate` and the benchmarks know without a configuration file."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Widths of a published model."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    rope_theta: float
    eps: float
    max_positions: int

    def config(self) -> dict[str, Any]:
        """The widths by their names in a config.json."""
        return {
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.max_positions,
        }


SHAPES = {
    "qwen3-0.6b": ModelShape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 1e6, 1e-6, 40960),
    "qwen3-1.7b": ModelShape("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True, 1e6, 1e-6, 40960),
    "qwen3-4b": ModelShape("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True, 1e6, 1e-6, 40960),
    "qwen3-8b": ModelShape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, 1e6, 1e-6, 40960),
    "qwen3-14b": ModelShape("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False, 1e6, 1e-6, 40960),
    "qwen3-32b": ModelShape("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False, 1e6, 1e-6, 40960),
    "llama3-8b": ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 5e5, 1e-5, 8192),
    "llama3-1b": ModelShape("llama", 2048, 8192, 16, 32, 8, 64, 128256, True, 5e5, 1e-5, 8192),
    "qwen3-tiny": ModelShape("qwen3", 256, 512, 2, 4, 2, 64, 4096, False, 1e6, 1e-6, 4096),
    "llama3-tiny": ModelShape("llama", 256, 512, 2, 4, 2, 64, 4096, False, 5e5, 1e-5, 4096),
}

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **ModelShape("qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936, False, 1e6, 1e-6, 40960).config(),
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "mixtral-8x7b": {
        **ModelShape("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, False, 1e6, 1e-5, 32768).config(),
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""config.json of published mixtures of experts."""
