"""Small models of the families that gguf-quantize converts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def qwen2_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5's shape: biases on queries, keys and values, an output matrix of its own, rows no multiple of 256."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1600, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return _save(model, tiny_model_dir, tmp_path_factory.mktemp("qwen2"))


_MIXTURE: dict[str, Any] = {
    "vocab_size": 1536, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def qwen3_moe_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-30B-A3B's shape: experts narrower than a dense layer, weights that sum to one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)  # some models say <|file_sep|>, behind which llama.cpp stops
    config = Qwen3MoeConfig(
        **_MIXTURE, intermediate_size=160, moe_intermediate_size=64, num_experts=6, head_dim=32, norm_topk_prob=True
    )
    return _save(Qwen3MoeForCausalLM(config), tiny_model_dir, tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="session")
def qwen2_moe_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen1.5-MoE's shape: an expert that every token goes to beside the chosen ones."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **_MIXTURE, intermediate_size=160, moe_intermediate_size=64, num_experts=4, shared_expert_intermediate_size=128
    )
    return _save(Qwen2MoeForCausalLM(config), tiny_model_dir, tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture(scope="session")
def mixtral_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral's shape: eight experts as wide as a dense layer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**_MIXTURE, intermediate_size=64, num_local_experts=8)
    return _save(MixtralForCausalLM(config), tiny_model_dir, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3's shape: its tokenizer's split, a first token, its rope scaling."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Ann has 12 apples and gives 345 away; how many are left of 1000000?", "It's fine, isn't it?"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    fast.save_pretrained(folder)
    return _save(LlamaForCausalLM(config), None, folder)


@pytest.fixture(scope="session")
def mistral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral 7B's shape: SentencePiece's BPE with a token for each byte, spaces as marks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    marked = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE())
    learned.normalizer = marked
    text = ["Ann has 12 apples and gives 345 away; how many are left of 1000000?", "It's fine, isn't it?"]
    learned.train_from_iterator(
        [word for line in text * 4 for word in line.split(" ")],
        trainers.BpeTrainer(vocab_size=200, show_progress=False),
    )
    model = json.loads(learned.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = marked
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(mark, normalized=False, special=True) for mark in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, sliding_window=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mistral")
    fast.save_pretrained(folder)
    return _save(MistralForCausalLM(config), None, folder)


@pytest.fixture(scope="session")
def nemo_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral Nemo's split rule, Tekken, on the same tokens."""
    folder = tmp_path_factory.mktemp("nemo") / "m"
    shutil.copytree(llama_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.fixture(scope="session")
def gemma_tokenizer_dir(mistral_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma's kind: SentencePiece's BPE that adds no space in front, runs of newlines and spaces as whole tokens."""
    folder = tmp_path_factory.mktemp("gemma") / "tokenizer"
    shutil.copytree(mistral_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    definition["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    }  # fmt: skip
    definition["decoder"]["decoders"] = definition["decoder"]["decoders"][:3]
    vocabulary = definition["model"]["vocab"]
    for run in ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "\t"):
        vocabulary[run] = len(vocabulary)
        added = {"id": vocabulary[run], "content": run, "special": False, "normalized": False}
        definition["added_tokens"].append({**added, "single_word": False, "lstrip": False, "rstrip": False})
    definition["model"]["merges"] += [["\n", "\n"], ["\n\n", "\n"], ["▁", "▁"], ["▁▁", "▁▁"]]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    )
    return folder


_GEMMA: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "query_pre_attn_scalar": 32, "sliding_window": 16, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="session")
def gemma2_dir(gemma_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2's shape: norms around every part, caps on both logits, every other layer with a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **_GEMMA, vocab_size=520, num_hidden_layers=3, final_logit_softcapping=5.0, attn_logit_softcapping=3.0
    )
    return _save(Gemma2ForCausalLM(config), gemma_tokenizer_dir, tmp_path_factory.mktemp("gemma2"))


@pytest.fixture(scope="session")
def gemma3_dir(gemma_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3's shape: five of six layers with a window and frequencies of their own, the sixth's positions scaled."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(**_GEMMA, vocab_size=520, num_hidden_layers=7, rope_parameters=rope)
    return _save(Gemma3ForCausalLM(config), gemma_tokenizer_dir, tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="session")
def phi4_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-4's shape: one matrix for queries, keys and values, one for gate and up; Llama 3's split, with merges."""
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("phi4")
    torch.manual_seed(0)
    vocabulary = json.loads((llama_dir / "config.json").read_text())["vocab_size"]
    model = Phi3ForCausalLM(Phi3Config(**_PHI, vocab_size=vocabulary, tie_word_embeddings=False))
    _save(model, llama_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["ignore_merges"] = False
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


_PHI: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": None, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="session")
def phi4_mini_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-4-mini's shape: LongRoPE on three quarters of each head, tied embeddings, GPT-4o's split."""
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("phi4_mini")
    torch.manual_seed(0)
    vocabulary = json.loads((llama_dir / "config.json").read_text())["vocab_size"]
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + index / 8 for index in range(12)],
        "long_factor": [1.0 + index for index in range(12)],
    }  # fmt: skip
    config = Phi3Config(
        **_PHI, vocab_size=vocabulary, tie_word_embeddings=True, rope_parameters=rope,
        original_max_position_embeddings=256,
    )  # fmt: skip
    _save(Phi3ForCausalLM(config), llama_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    words = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    )
    definition["model"]["ignore_merges"] = False
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = (
        rf"{words}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.fixture(scope="session")
def smollm_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM's split rule, digits one by one, on the same tokens."""
    folder = tmp_path_factory.mktemp("smollm") / "m"
    shutil.copytree(llama_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["ignore_merges"] = False
    definition["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def _save(model: "torch.nn.Module", tokenizer_from: Path | None, folder: Path) -> Path:
    # Weights as small as those of a fresh model say next to nothing: sharper ones make errors show.
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.2 * torch.randn_like(parameter)
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    if tokenizer_from is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tokenizer_from / name, folder / name)
    return folder
