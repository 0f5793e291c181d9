from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from finemill.errors import UserError
from finemill.models.adapter import load_adapter
from finemill.models.base.resolve import ResolvedBase
from finemill.training.adapter import lora_config, save_adapter
from finemill.training.config import LoRATrainingConfig
from finemill.training.quantized_base import load_base


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "down_proj"), ("embed_tokens",), ("model.layers.0.self_attn.q_proj",)]
)
def test_layers_that_there_are_may_be_named(targets: str | tuple[str, ...], tiny_model_dir: Path) -> None:
    lora_config(tiny_model_dir, LoRATrainingConfig.model_validate({"target_modules": targets}))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_prooj",),
            r"'q_prooj' fits no layer of the base model; there are embed_tokens, q_proj, k_proj, .*down_proj$",
        ),
        (("q_proj", "prooj"), "'prooj' fits no layer"),
        (("roj",), "'roj' fits no layer"),
        (("self_attn",), "'self_attn' is no layer that takes an adapter"),
        (("input_layernorm",), "'input_layernorm' is no layer that takes an adapter"),
    ],
)
def test_a_name_that_fits_no_layer_is_refused_with_those_there_are(
    targets: tuple[str, ...], message: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(UserError, match=message):
        lora_config(tiny_model_dir, LoRATrainingConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("named", "saved"),
    [(["norm"], ["model.norm"]), (["q_norm", "embed_tokens", "lm_head"], ["q_norm", "embed_tokens", "lm_head"])],
)
def test_modules_that_end_alike_are_not_trained_along(named: list[str], saved: list[str], tiny_model_dir: Path) -> None:
    """PEFT takes all whose name ends so."""
    adapters = lora_config(tiny_model_dir, LoRATrainingConfig.model_validate({"modules_to_save": named}))
    assert adapters is not None
    assert adapters.modules_to_save == saved


def test_the_embedding_of_another_family_is_tied_to_its_output_layer_too(tmp_path: Path) -> None:
    """GPT-2 calls it wte, and has linear layers of a class of its own."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    config.save_pretrained(tmp_path)
    settings = {"modules_to_save": ["wte"], "embedding_learning_rate": 1e-5, "target_modules": ["c_attn"]}
    adapters = lora_config(tmp_path, LoRATrainingConfig.model_validate(settings))
    assert adapters is not None
    assert adapters.ensure_weight_tying
    with torch.device("meta"):
        model: Any = get_peft_model(AutoModelForCausalLM.from_config(config), adapters)
    ends = model.get_base_model().transformer.wte, model.get_base_model().lm_head
    embedding, output = (end.modules_to_save["default"].weight for end in ends)
    assert embedding is output


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 64,
}
QWEN3_MOE = Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64)
MIXTURES: dict[str, PretrainedConfig] = {
    "qwen3_moe": QWEN3_MOE,
    "one dense layer": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64, mlp_only_layers=[0]),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "shared expert": Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64),
}
ATTENTION, HALVES = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("name", "targets", "modules", "parameters"),
    [
        ("qwen3_moe", "all-linear", ATTENTION, STACKS),
        ("mixtral", "all-linear", ATTENTION, STACKS),
        ("one dense layer", "all-linear", [*HALVES, *ATTENTION], STACKS),
        ("shared expert", "all-linear", [*ATTENTION, *HALVES], STACKS),
        ("qwen3_moe", "attention", ATTENTION, None),
        ("qwen3_moe", "mlp", [], STACKS),
        ("shared expert", "mlp", HALVES, STACKS),
        ("qwen3_moe", ("q_proj", "mlp.experts.down_proj"), ["q_proj"], STACKS[1:]),
        ("qwen3_moe", (*ATTENTION, *HALVES), ATTENTION, STACKS),
    ],
)
def test_experts_get_adapters_and_routers_do_not(
    name: str, targets: Any, modules: list[str], parameters: list[str] | None, tmp_path: Path
) -> None:
    MIXTURES[name].save_pretrained(tmp_path)
    config = lora_config(tmp_path, LoRATrainingConfig(target_modules=targets))
    assert config is not None
    assert sorted(config.target_modules or ()) == sorted(modules)
    assert config.target_parameters == parameters
    assert config.modules_to_save is None


def test_routers_are_trained_on_request(tmp_path: Path) -> None:
    MIXTURES["shared expert"].save_pretrained(tmp_path)
    config = lora_config(tmp_path, LoRATrainingConfig(train_router=True))
    assert config is not None
    assert config.modules_to_save == ["mlp.gate", "mlp.shared_expert_gate"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("gate",)}, "'gate' is a router, which train_router trains as a whole"),
        ({"target_modules": ("gate_proj",)}, "'gate_proj' fits no layer .*o_proj, gate_up_proj, down_proj$"),
        ({"lora_dropout": 0.1}, r"lora_dropout 0\.1 is not for adapters of experts"),
        ({"use_dora": True}, "use_dora True is not for adapters of experts"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' is not for adapters of experts"),
    ],
)
def test_what_experts_do_not_take_is_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    QWEN3_MOE.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        lora_config(tmp_path, LoRATrainingConfig(**settings))


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", ("q_proj", "fc1")])
def test_what_rows_of_text_never_pass_gets_no_adapter(targets: str | tuple[str, ...], tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=SIZES | {"head_dim": 32}, vision_config=vision)
    config.save_pretrained(tmp_path)
    settings = LoRATrainingConfig.model_validate({"target_modules": targets})
    if not isinstance(targets, str):
        with pytest.raises(UserError, match="'fc1' fits no layer of the base model"):
            lora_config(tmp_path, settings)
        return
    adapters = lora_config(tmp_path, settings)
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapters)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("language_model.layers." in name for name in names)


WIDE: dict[str, Any] = {"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
WHOLE: dict[str, PretrainedConfig] = {
    "a router with a buffer": DeepseekV3Config(
        **WIDE, num_hidden_layers=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
    "a tower that rows of text never pass": Gemma3Config(
        text_config=WIDE | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 32},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_is_trained_whole_opens_as_any_adapter(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(WHOLE[name]).save_pretrained(base)
    model = load_base(base, LoRATrainingConfig(method="full"), torch.device("cpu"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("vision" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1
    trainer: Any = SimpleNamespace(model=model, state=SimpleNamespace(max_steps=1, log_history=[{"loss": 1.0}]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    save_adapter(trainer, tokenizer, tmp_path / "adapter", ResolvedBase(base, {}, "base"), rope_scaling=None)
    tuned = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_module_with_weights_beside_its_parts_cannot_be_trained_whole(tmp_path: Path) -> None:
    """As attention of gpt-oss has its sinks; PEFT would not open what was saved."""
    GptOssConfig(**SIZES, num_local_experts=4, head_dim=32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be saved .* model\.layers\.0\.self_attn has weights beside"):
        lora_config(tmp_path, LoRATrainingConfig(method="full"))


def test_a_dense_base_has_no_routers(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match="train_router: the base model is dense"):
        lora_config(tiny_model_dir, LoRATrainingConfig(train_router=True))
