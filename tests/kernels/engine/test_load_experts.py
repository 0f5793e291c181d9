"""A hub checkpoint of a mixture of experts, read without transformers: the same loss, adapters under PEFT's names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from finemill.errors import UserError
from finemill.kernels.engine.experts import ExpertMLP
from finemill.kernels.engine.load import LoraSettings, load_model
from finemill.kernels.engine.nf4_quantize import quantize_nf4
from finemill.kernels.engine.plan import Level, Plan
from finemill.kernels.ops.nf4_stack import NF4Stack
from finemill.kernels.ops.packing import pack_rows

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, num_experts=4, norm_topk_prob=True),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=4),
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def rows(device: str) -> torch.Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)


def test_loss_is_transformers_and_parameters_are_pefts(checkpoint: Path, device: str) -> None:
    ids = rows(device)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device)
    expected = reference(input_ids=ids, labels=ids).loss
    engine, parameters = load_model(checkpoint, device=torch.device(device), dtype=torch.float32, quantize=False)
    loss = engine.loss_and_grad(pack_rows(ids, ids).to(torch.device(device)), 1.0).loss / (2 * 23)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    adapted = get_peft_model(
        reference,
        LoraConfig(
            r=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    names = {name[name.index("layers.") :]: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name: parameter.shape for name, parameter in parameters.items()} == names


def test_every_expert_is_quantized_as_the_checkpoints_matrix(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    engine, _ = load_model(tmp_path, device=torch.device(device))
    tensors = load_file(tmp_path / "model.safetensors")
    mlp = engine.layers[1].mlp
    assert isinstance(mlp, ExpertMLP)
    assert isinstance(mlp.gate_up.weight, NF4Stack)
    ours, expected = mlp.gate_up.weight.matrix(2 * 2 + 1), quantize_nf4(tensors[EXPERT].to(device))
    assert torch.equal(ours.packed, expected.packed)
    assert torch.equal(ours.absmax, expected.absmax)
    assert torch.equal(mlp.router.cpu(), tensors["model.layers.1.mlp.gate.weight"])


@pytest.mark.parametrize("plan", ["streamed", "cached", "recomputed", pytest.param("parked", marks=pytest.mark.gpu)])
def test_every_plan_gives_the_same_bits(plan: str, tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    batch = pack_rows(rows(device), rows(device)).to(torch.device(device))

    def grads(plan: Plan) -> torch.Tensor:
        torch.manual_seed(2)
        engine, parameters = load_model(tmp_path, device=torch.device(device), lora=LoraSettings(8, 16))
        for parameter in parameters.values():
            parameter.data.normal_(std=0.05)
        engine.apply_plan(plan)
        engine.loss_and_grad(batch, 1.0)
        return engine.adapters.grad

    levels, nothing = (Level.ALL,) * 2, (None,) * 2
    plans = {
        "streamed": Plan(levels, nothing, 0, 1024, stream_weights=True),
        "cached": Plan(levels, nothing, 2, 1024),
        "recomputed": Plan((Level.INPUT, Level.ATTENTION), nothing, 0, 1024),
        "parked": Plan(levels, (Level.GATE_UP, None), 0, 1024, bytes_per_token={Level.GATE_UP: 2**14}),
    }
    assert torch.equal(grads(plans[plan]), grads(Plan(levels, nothing, 0, 1024)))


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(EXPERT), "layer 1 of the checkpoint lacks 1 of its 12 expert matrices, first of expert 2"),
        (lambda t: t.update({EXPERT.replace("2.up", "4.up"): t[EXPERT].clone()}), "config.json has 4 experts"),
        (lambda t: t.update({EXPERT: t[EXPERT][:64].clone()}), r"has shape \(64, 64\), config.json says \(128, 64\)"),
        (lambda t: t.pop("model.layers.0.mlp.gate.weight"), "layer 0 of the checkpoint has experts and no router"),
    ],
)
def test_experts_that_are_missing_or_do_not_fit_are_one_line(edit: Any, message: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path, device=torch.device("cpu"), quantize=False)


def test_dropout_on_experts_is_refused_as_peft_does(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lora_dropout is 0\.1"):
        load_model(tmp_path, device=torch.device("cpu"), lora=LoraSettings(dropout=0.1))
