"""Every kind of LoRA, merged one module at a time, against PEFT's own merge of the whole model."""

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip

from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.step import run
from finemill.errors import StepError, UserError
from finemill.models.write_weights import WeightFiles
from finemill.runtime.context import StepContext

SMALL: dict[str, Any] = {
    "vocab_size": 1536, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen2": lambda shape: Qwen2ForCausalLM(Qwen2Config(**shape)),
    "qwen3": lambda shape: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16)),
    "qwen3_moe": lambda shape: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **MOE, head_dim=16)),
    "qwen2_moe": lambda shape: Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape, **MOE, shared_expert_intermediate_size=48)),
    "gpt_oss": lambda shape: GptOssForCausalLM(GptOssConfig(**shape, num_local_experts=4, head_dim=16)),
    "mixtral": lambda shape: MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4)),
}


def base_dir(family: str, tiny_model_dir: Path, folder: Path, *, tied: bool = True) -> Path:
    """A random model with the tiny model's tokenizer, bfloat16."""
    torch.manual_seed(0)
    shape = {**SMALL, "tie_word_embeddings": tied, "initializer_range": 0.1}
    model = FAMILIES[family.removesuffix(", stacked")](shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format="stacked" not in family)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model_dir / name, folder / name)
    return folder


def draw(tuned: Any) -> None:
    """Weights as if trained: everything that PEFT would train is moved."""
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def adapter_dir(base: Path, folder: Path, config: LoraConfig, num_tokens: int | None = None) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if num_tokens:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config)
        draw(tuned)
        tuned.save_pretrained(folder, save_embedding_layers=bool(num_tokens))
    return folder


def merge(base: Path, adapter: Path, output: Path, context: StepContext, **config: Any) -> Path:
    values = MergeConfig(**{"force": True, **config})
    run(base_model=base, adapter=adapter, output_dir=output, config=values, context=context)
    return output


def peft_merge(base: Path, adapter: Path, num_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """The state of PEFT's merged model in float32, whole in memory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if num_tokens:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    embedding = model.get_input_embeddings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(model, adapter)
        # Merged into a shared matrix, a change of one end would show in the other.
        ends = (tuned.get_base_model().get_input_embeddings(), tuned.get_base_model().get_output_embeddings())
        if any(type(end) not in (torch.nn.Embedding, torch.nn.Linear) for end in ends):
            linear = (module for module in tuned.modules() if isinstance(module, torch.nn.Linear))
            holder = next((module for module in linear if module.weight is embedding.weight), torch.nn.Linear(1, 1))
            holder.weight = torch.nn.Parameter(holder.weight.detach().clone())
        merged: torch.nn.Module = tuned.merge_and_unload(safe_merge=True)
    return merged.state_dict()


KINDS = {
    "rank-stabilized": ("qwen2", LoraConfig(r=4, target_modules="all-linear", use_rslora=True)),
    "DoRA": ("qwen2", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)),
    "ranks and alphas": (
        "qwen2",
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.1.mlp.down_proj": 32},
        ),
    ),
    "trained biases": ("qwen2", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], bias="all")),
    "adapters' biases": ("qwen2", LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)),
    "whole modules": ("qwen2", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm", "v_proj"])),
    "embedding": ("qwen2", LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])),
    "embedding, DoRA": ("qwen2", LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)),
    "output matrix": ("qwen2", LoraConfig(r=4, target_modules=["q_proj", "lm_head"])),
    "whole output matrix": ("qwen2", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "experts": (
        "qwen3_moe",
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "experts with inputs before outputs": (
        "gpt_oss",
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_peft_merges(
    kind: str, tied: bool, tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    family, config = KINDS[kind]
    base = base_dir(family, tiny_model_dir, tmp_path / "base", tied=tied)
    adapter = adapter_dir(base, tmp_path / "adapter", config)
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    expected = peft_merge(base, adapter)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert any(not torch.equal(found[name], before[name]) for name in found)


TO_EXPERTS: dict[str, Any] = {
    "r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}  # fmt: skip
EXPERTS = LoraConfig(**TO_EXPERTS)


@pytest.mark.parametrize("family", ["qwen3_moe, stacked", "qwen2_moe", "mixtral", "mixtral, stacked"])
def test_experts_of_each_family_are_written_as_the_hub_has_them(
    family: str, tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir(family, tiny_model_dir, tmp_path / "base", tied=False)
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(**TO_EXPERTS, modules_to_save=["gate"]))
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    as_on_hub = base_dir(family.removesuffix(", stacked"), tiny_model_dir, tmp_path / "hub", tied=False)
    written, hub = (load_file(folder / "model.safetensors") for folder in (merged, as_on_hub))
    assert {name: values.shape for name, values in written.items()} == {name: hub[name].shape for name in hub}
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    for name, tensor in peft_merge(base, adapter).items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name
    with torch.no_grad():
        ids = torch.arange(5, 60)[None]
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        # Weights that were rounded now and then send a token to another expert.
        assert (model.float()(ids).logits - tuned(ids).logits).abs().mean() < 0.01
    record = json.loads((merged / "merge.json").read_text())
    stacks = [tensor["experts"] for tensor in record["tensors"] if "experts" in tensor["name"]]
    assert [len(experts) for experts in stacks] == [4] * 4
    assert min(map(min, stacks)) > 0
    assert "--enable-expert-parallel" in (merged / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "key", "named"),
    [
        (
            "qwen3_moe",
            "model.layers.1.mlp.experts.2.down_proj.weight",
            r"layers\.1\.mlp\.experts\.down_proj, expert 2,",
        ),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", r"experts\.gate_up_proj, expert 3,"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", r"mlp\.gate\.weight was changed"),
        ("qwen2", "model.layers.1.self_attn.q_proj.weight", r"layers\.1\.self_attn\.q_proj\.weight is not written"),
    ],
)
def test_a_tensor_or_expert_that_lost_its_change_on_the_way_to_the_disk_is_named(
    family: str,
    key: str,
    named: str,
    tiny_model_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_dir(family, tiny_model_dir, tmp_path / "base")
    config = EXPERTS if family == "qwen3_moe" else LoraConfig(r=2, target_modules=["q_proj"])
    adapter = adapter_dir(base, tmp_path / "adapter", config)

    lost = load_file(base / "model.safetensors")[key] + ("gate.weight" in key)
    write = WeightFiles.write

    def write_and_lose(files: WeightFiles, name: str, values: torch.Tensor, first_row: int = 0) -> None:
        write(files, name, lost if name == key else values, first_row)

    monkeypatch.setattr(WeightFiles, "write", write_and_lose)
    with pytest.raises(StepError, match=named):
        merge(base, adapter, tmp_path / "merged", step_context, max_kl=100, min_top1_agreement=1e-9)


def test_a_change_of_the_experts_is_no_change_of_a_dense_model_and_the_reverse(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    bases = {name: base_dir(name, tiny_model_dir, tmp_path / name) for name in ("qwen3", "qwen3_moe")}
    dense = adapter_dir(bases["qwen3"], tmp_path / "of_dense", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    experts = adapter_dir(bases["qwen3_moe"], tmp_path / "of_experts", EXPERTS)
    with pytest.raises(UserError, match=r"is of a dense model .*up_proj\), and the base \(Qwen3MoeForCausalLM\) is"):
        merge(bases["qwen3_moe"], dense, tmp_path / "merged", step_context)
    with pytest.raises(UserError, match=r"changes experts .*, and the base \(Qwen3ForCausalLM\) is a dense model"):
        merge(bases["qwen3"], experts, tmp_path / "merged", step_context)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight"]),
        LoraConfig(r=2, target_modules="all-linear"),
    ],
)
def test_an_adapter_on_the_router_is_refused(
    config: LoraConfig, tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen3_moe", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", config)
    context = dataclasses.replace(step_context, references={**step_context.references, "base_model": str(base)})
    with pytest.raises(UserError, match=r"LoRA on the router, model\.layers\.0\.mlp\.gate for one of 2"):
        merge(base, adapter, tmp_path / "merged", context, force=False)


def test_a_pair_of_factors_per_expert_as_older_versions_saved_them_is_merged(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen3_moe", tiny_model_dir, tmp_path / "base", tied=False)
    LoraConfig(r=2, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]).save_pretrained(tmp_path / "a")
    expected = load_file(base / "model.safetensors")
    factors: dict[str, torch.Tensor] = {}
    for name, values in expected.items():
        if ".experts." in name:
            a, b = 0.1 * torch.randn(2, values.shape[1]), 0.1 * torch.randn(len(values), 2)
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            expected[name] = (values.float() + 4 * b @ a).bfloat16()
    save_file(factors, tmp_path / "a/adapter_model.safetensors", metadata={"format": "pt"})
    merged = load_file(merge(base, tmp_path / "a", tmp_path / "merged", step_context) / "model.safetensors")
    assert len(factors) == 2 * 3 * 4 * 2
    for name, values in expected.items():
        torch.testing.assert_close(merged[name], values, msg=name)


def test_tokens_trained_in_a_tied_embedding_keep_it_tied(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 700]})
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", config)
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    found, expected = load_file(merged / "model.safetensors"), peft_merge(base, adapter)
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"].bfloat16())


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_make_the_merged_model_larger(
    tied: bool, tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base", tied=tied)
    adapter = adapter_dir(base, tmp_path / "adapter", config, num_tokens=1600)
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    expected = peft_merge(base, adapter, num_tokens=1600)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    assert len(model.get_output_embeddings().weight) == 1600


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
        (True, {"target_modules": ["lm_head"]}),
        (True, {"trainable_token_indices": [1540, 1550]}),
    ],
)
def test_a_table_that_grew_before_it_was_trained_is_written_so(
    tied: bool, settings: dict[str, Any], tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base", tied=tied)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    adapter = adapter_dir(base, tmp_path / "adapter", config, num_tokens=1600)
    merged = AutoModelForCausalLM.from_pretrained(
        merge(base, adapter, tmp_path / "merged", step_context), dtype=torch.float32
    )
    tuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned.resize_token_embeddings(1600, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel.from_pretrained(tuned, adapter).eval()
    ids = torch.tensor([[5, 700, 1540, 1550]])
    with torch.inference_mode():
        expected, found = (model(ids).logits.log_softmax(-1) for model in (tuned, merged))
    assert merged.config.vocab_size == 1600
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-3


def test_a_base_that_only_says_that_it_ties_its_ends_keeps_both_as_in_transformers(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base", tied=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    found, expected = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert SourceModel(base).names()["lm_head.weight"] == "output.weight"


def test_a_row_of_its_own_for_what_is_no_token_is_refused(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3])
    adapter = adapter_dir(base, tmp_path / "adapter", config)
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**values, "trainable_token_indices": [9999]}))
    with pytest.raises(UserError, match=r"token id 9999 .*, its tokenizer has 1536 tokens, base and adapter 1536"):
        merge(base, adapter, tmp_path / "merged", step_context)


def test_a_tokenizer_with_more_tokens_than_the_merged_model_is_refused(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["added_tokens"].append(
        {**definition["added_tokens"][-1], "id": 1536, "content": "<new>", "special": False}
    )
    (adapter / "tokenizer.json").write_text(json.dumps(definition))
    shutil.copy(base / "tokenizer_config.json", adapter / "tokenizer_config.json")
    with pytest.raises(UserError, match=r"token id 1536, '<new>', the merged model only 1536 .*modules_to_save"):
        merge(base, adapter, tmp_path / "merged", step_context)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_base_that_holds_no_numbers_is_named(
    name: str, tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    weights = load_file(base / "model.safetensors")
    weights[name].view(-1)[5] = math.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=rf"{name.removesuffix('.weight')}.* holds NaN or infinity: the base is damaged"
    ):
        merge(base, adapter, tmp_path / "merged", step_context)


def test_an_adapter_that_acts_on_some_tokens_only_is_refused(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5, 7], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"trained with alora_invocation_tokens.* serve base and adapter unmerged"):
        merge(base, adapter_dir(base, tmp_path / "adapter", config), tmp_path / "merged", step_context)


def test_new_tokens_without_an_output_matrix_are_refused(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base", tied=False)
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]), num_tokens=1600)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"needs 1600 rows of model.embed_tokens.weight and 1536 of lm_head.weight"):
        merge(base, adapter, tmp_path / "merged", step_context)


def test_biases_for_layers_without_one_are_refused(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["up_proj"], lora_bias=True))
    with pytest.raises(UserError, match=r"lora_bias, and model\.layers\.0\.mlp\.up_proj has no bias"):
        merge(base, adapter, tmp_path / "merged", step_context)


def test_half_the_scale_is_the_average_of_base_and_tuned(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules="all-linear"))
    half = merge(base, adapter, tmp_path / "half", step_context, scale=0.5, dtype="float32")
    before, tuned, found = (
        load_file(base / "model.safetensors"),
        peft_merge(base, adapter),
        load_file(half / "model.safetensors"),
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (before[name].float() + tuned[name]) / 2)
    dora = adapter_dir(base, tmp_path / "dora", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match=r"scale 0\.5 needs plain LoRA; model\.layers\.0\.self_attn\.q_proj"):
        merge(base, dora, tmp_path / "other", step_context, scale=0.5)


def test_float16_that_overflows_is_refused(tiny_model_dir: Path, step_context: StepContext, tmp_path: Path) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"down_proj\.weight has values up to 9.98e\+04, and float16 ends at 65504"):
        merge(base, adapter, tmp_path / "merged", step_context, dtype="float16")


def test_a_tensor_that_the_base_keeps_in_32_bits_stays_so(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    merged = load_file(merge(base, adapter, tmp_path / "merged", step_context) / "model.safetensors")
    assert torch.equal(merged["model.norm.weight"], tensors["model.norm.weight"])
    assert merged["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_what_a_model_has_no_use_for_is_kept_whatever_its_type(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    types = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.complex64, torch.int64)
    more = {f"model.extra.{number}": torch.ones(3).to(dtype) for number, dtype in enumerate(types)}
    save_file({**load_file(base / "model.safetensors"), **more}, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    configuration = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**configuration, "quantization_config": {}}))
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    found = load_file(merged / "model.safetensors")
    for name, tensor in more.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


def test_a_change_smaller_than_the_rounding_step_is_said(
    tiny_model_dir: Path, step_context: StepContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    adapter = adapter_dir(base, tmp_path / "adapter", LoraConfig(r=4, target_modules="all-linear"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor *= 1e-3
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged = merge(base, adapter, tmp_path / "merged", step_context)
    assert "of the adapter's change" in caplog.text
    record = json.loads((merged / "merge.json").read_text())
    assert 0 < record["share_landed"] < 0.9
    assert len(record["tensors"]) == 14
