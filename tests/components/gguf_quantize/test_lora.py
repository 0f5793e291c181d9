"""An adapter beside a GGUF file of its base is, in llama.cpp, what PEFT makes of the two."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.lora import write_lora
from finemill.components.gguf_quantize.verify import kl_divergence
from finemill.components.gguf_quantize.write import write_gguf
from finemill.errors import UserError
from finemill.models.causal_lm import load_causal_lm
from finemill.models.llama_cpp import serve

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "o_proj"]


def save_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """An adapter whose weights were drawn, and PEFT's model with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(load_causal_lm(base, dtype=torch.float32), LoraConfig(**options))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder)
    return tuned.eval()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama_dir", {"r": 4, "target_modules": "all-linear", "use_rslora": True}),
        ("qwen3_moe_dir", {"r": 2, "lora_alpha": 6, "target_modules": ATTENTION, "target_parameters": STACKS}),
        ("mixtral_dir", {"r": 4, "target_modules": ATTENTION, "rank_pattern": {"k_proj": 2}}),
    ],
)
@torch.inference_mode()
def test_llama_cpp_computes_what_peft_does(
    family: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(family)
    tuned = save_adapter(base, tmp_path / "adapter", **options)
    write_gguf(SourceModel(base), tmp_path / "base.gguf", "F32", "base", 1)
    assert write_lora(base, tmp_path / "adapter", tmp_path / "lora.gguf") > 4
    ids = AutoTokenizer.from_pretrained(base)("Ann has 12 apples and gives 5 away; how many?")["input_ids"]
    with_adapter = tuned(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    with tuned.disable_adapter():
        without = tuned(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    with serve(tmp_path / "base.gguf", 1, 64, adapter=tmp_path / "lora.gguf") as server:
        found = server.next_token_log_probabilities(ids, len(without))
    assert kl_divergence(with_adapter, found) < 1e-4
    assert kl_divergence(without, found) > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_what_llama_cpp_does_not_add_is_refused(options: dict[str, Any], llama_dir: Path, tmp_path: Path) -> None:
    save_adapter(llama_dir, tmp_path / "adapter", r=2, **options)
    with pytest.raises(UserError, match=r"gguf-lora: \S+ is .*merge the adapter"):
        write_lora(llama_dir, tmp_path / "adapter", tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_biases_that_were_trained_are_not_left_out(qwen2_dir: Path, tmp_path: Path) -> None:
    save_adapter(qwen2_dir, tmp_path / "adapter", r=2, target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(UserError, match=r"q_proj\.bias is trained as a whole, .*merge the adapter"):
        write_lora(qwen2_dir, tmp_path / "adapter", tmp_path / "lora.gguf")
