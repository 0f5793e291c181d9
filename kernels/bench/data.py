"""Inputs of the step benchmark: model shapes, random checkpoints on disk, token batches, adapter start.

Everything is a function of a name and a seed, so that any implementation measured beside this one on the same machine
trains the same weights on the same tokens from the same adapters, and losses compare step by step.
"""

import json
import math
import shutil
import zlib
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from pyarrow.parquet import read_table
from torch import Tensor, nn

from finemill.kernels.ops.packing import IGNORE_INDEX
from finemill.kernels.planning.model_shapes import SHAPES, ModelShape

SHARD_BYTES = 3_500_000_000
FOLDERS = (Path("/dev/shm/bench_models"), Path("/tmp/bench_models"))
"""Where checkpoints are looked for and made: memory first, so that reading them measures the loader."""


def tensor_specs(shape: ModelShape) -> list[tuple[str, tuple[int, ...], bool]]:
    """Return (name, shape, random) of every tensor in the Hugging Face layout; norms are ones."""
    q, kv, h, i = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden, shape.intermediate
    specs: list[tuple[str, tuple[int, ...], bool]] = [("model.embed_tokens.weight", (shape.vocabulary, h), True)]
    for index in range(shape.layers):
        prefix = f"model.layers.{index}."
        matrices = {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }
        norms = {"input_layernorm": h, "post_attention_layernorm": h}
        if shape.family == "qwen3":
            norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
        specs += [(f"{prefix}{name}.weight", size, True) for name, size in matrices.items()]
        specs += [(f"{prefix}{name}.weight", (size,), False) for name, size in norms.items()]
    specs.append(("model.norm.weight", (h,), False))
    if not shape.tied:
        specs.append(("lm_head.weight", (shape.vocabulary, h), True))
    return specs


def ensure_checkpoint(name: str, layers: int, device: torch.device, seed: int = 1234) -> Path:
    """Find or make the random bf16 checkpoint of a shape, cut to `layers` layers if that is not 0."""
    shape = SHAPES[name]
    if layers:
        shape = ModelShape(**{**shape.__dict__, "layers": layers})
    folder_name = f"{name}-L{shape.layers}"
    for base in FOLDERS:
        if (base / folder_name / "DONE").exists():
            return base / folder_name
    specs = tensor_specs(shape)
    size = 2 * sum(math.prod(dims) for _, dims, _ in specs)
    base = next((b for b in FOLDERS if shutil.disk_usage(b.parent).free > 1.6 * size + (1 << 30)), FOLDERS[-1])
    folder = base / folder_name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_shards(folder, specs, device, seed)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    special = {"bos_token_id": shape.vocabulary - 3, "eos_token_id": shape.vocabulary - 2}
    generation = special | {"pad_token_id": shape.vocabulary - 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    _write_tokenizer(folder, shape)
    (folder / "DONE").write_text("ok")
    return folder


def _write_shards(
    folder: Path, specs: list[tuple[str, tuple[int, ...], bool]], device: torch.device, seed: int
) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, dims, random in specs:
        if random:
            generator = torch.Generator(device=device).manual_seed(seed + zlib.crc32(name.encode()))
            tensor = torch.empty(dims, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02, generator=generator)
        else:
            tensor = torch.ones(dims, dtype=torch.bfloat16)
        shards[-1][name] = tensor.cpu()
        size += tensor.numel() * 2
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
    shards = [shard for shard in shards if shard]
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = 2 * sum(math.prod(dims) for _, dims, _ in specs)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _config(shape: ModelShape) -> dict[str, Any]:
    config = shape.config() | {
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": shape.vocabulary - 3,
        "eos_token_id": shape.vocabulary - 2,
    }
    if shape.family == "qwen3":
        window = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": shape.layers}
        return config | window | {"architectures": ["Qwen3ForCausalLM"]}
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


def _write_tokenizer(folder: Path, shape: ModelShape) -> None:
    """A word-level tokenizer that fills the vocabulary exactly, so that no library resizes the embedding."""
    vocabulary = {f"t{i}": i for i in range(shape.vocabulary - 4)}
    for offset, token in zip((4, 3, 2, 1), ("<unk>", "<s>", "</s>", "<pad>"), strict=True):
        vocabulary[token] = shape.vocabulary - offset
    added = [
        {"id": vocabulary[token], "content": token, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for token in ("<unk>", "<s>", "</s>", "<pad>")
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": shape.max_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def start_adapters(parameters: dict[str, nn.Parameter], b_std: float = 0.01, seed: int = 7) -> None:
    """Set every LoRA tensor by its name ("layers.0...lora_A..."): A Kaiming-uniform, B normal."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            value = torch.empty(parameter.shape)
            if "lora_A" in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])
                value.uniform_(-bound, bound, generator=generator)
            else:
                value.normal_(0.0, b_std, generator=generator)
            parameter.copy_(value.to(parameter.dtype))


def make_batches(vocabulary: int, seq: int, bs: int, accum: int, sets: int, seed: int = 99) -> list[list[Tensor]]:
    """Return `sets` steps of `accum` micro-batches of random token ids (bs, seq), int64, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randint(0, vocabulary - 16, (bs, seq), generator=generator) for _ in range(accum)] for _ in range(sets)
    ]


def chat_rows(files: list[Path], tokenizer: Any, num_rows: int, max_length: int) -> list[dict[str, list[int]]]:
    """Return input_ids and labels of chat rows, the files in turn, labels on the answer only.

    Args:
        files: train.parquet files of chat-format, which hold both; or .json and .jsonl files of rows with
            `instruction`, `input` and `output`, or with `question` and `answer`.
        tokenizer: of the model; without a chat template the two texts follow each other.
        num_rows: at most.
        max_length: rows are cut to this many tokens; rows that lose their labels by it are left out.
    """

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        if "input_ids" in row:
            return row
        instruction = "\n".join(filter(None, (row.get("instruction"), row.get("input"))))
        prompt, answer = row.get("question", instruction), row["output" if "output" in row else "answer"]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head = tokenizer(prompt, add_special_tokens=False).input_ids
        tail = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return {"input_ids": head + tail, "labels": [IGNORE_INDEX] * len(head) + tail}

    cut = ({name: list(values[:max_length]) for name, values in encode(row).items()} for row in _in_turn(files))
    return list(islice((row for row in cut if max(row["labels"][1:], default=IGNORE_INDEX) >= 0), num_rows))


def _in_turn(files: list[Path]) -> list[Any]:
    """Rows of the files, one of each at a time."""

    def load(file: Path) -> list[Any]:
        if file.suffix == ".parquet":
            return list(read_table(file, columns=["input_ids", "labels"]).to_pylist())
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line]

    return [row for group in zip_longest(*map(load, files)) for row in group if row is not None]


def real_rows(files: list[Path], num_rows: int, vocabulary: int, max_length: int, seed: int = 99) -> list[list[int]]:
    """Return random token ids with the lengths of real chat rows (3.8 characters per token), the files in turn."""

    def characters(node: Any) -> int:
        if isinstance(node, str):
            return len(node)
        children = list(node.values()) if isinstance(node, dict) else node
        return sum(map(characters, children)) if isinstance(children, list) else 0

    generator = torch.Generator().manual_seed(seed)
    lengths = [min(max_length, 16 + int(characters(row) / 3.8)) for row in _in_turn(files)[:num_rows]]
    return [torch.randint(0, vocabulary - 16, (length,), generator=generator).tolist() for length in lengths]
