"""A base whose NF4 weights wait in host memory computes what one on the device does, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from finemill.errors import UserError
from finemill.kernels.accelerate import UnsupportedModelError, accelerate_model, adopt_plan, restore_model
from finemill.kernels.engine.plan import Plan
from finemill.kernels.engine.quantized_experts import quantize_experts
from finemill.kernels.streamed import load_streamed, quantized_linears, weight_stream_of
from tests.kernels.test_accelerate import ATTENTION_AND_EXPERTS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "dense": Qwen3Config(**SIZES),
    "mixture": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers: an odd number, so that both slots are the last one's in turn."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return {"input_ids": ids, "labels": ids.clone()}


def resident(path: Path, *, double_quant: bool = True) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": DEVICE}, quantization_config=quantization
    )
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            quantize_experts(layer.mlp.experts, double_quant=double_quant)
    return model.eval()


def streamed(path: Path, **settings: Any) -> Any:
    model = load_streamed(path, device=DEVICE, dtype=torch.float32, **settings)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    return model


def adapted(model: Any) -> Any:
    torch.manual_seed(2)
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if hasattr(model.model.layers[0].mlp, "experts"):  # PEFT counts routers among linear layers
        targets = ATTENTION_AND_EXPERTS
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.train()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("double_quant", [True, False])
def test_own_forward_and_generation_are_those_of_a_resident_base(
    checkpoint: Path, batch: dict[str, torch.Tensor], double_quant: bool
) -> None:
    ours = streamed(checkpoint, double_quant=double_quant)
    theirs = resident(checkpoint, double_quant=double_quant)
    assert weight_stream_of(ours) is not None
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
        prompt = batch["input_ids"][:1]
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(ours.generate(prompt, **settings), theirs.generate(prompt, **settings))


def test_gradients_are_those_of_a_resident_base(checkpoint: Path, batch: dict[str, torch.Tensor]) -> None:
    model = adapted(resident(checkpoint))
    assert accelerate_model(model).active
    expected_loss, expected = gradients(model, batch)
    model = adapted(streamed(checkpoint))
    assert accelerate_model(model).active
    for staying in (0, 1, 3, 2, 0):
        adopt_plan(model, replace(Plan.everything(5), stream_weights=True, resident_layers=staying))
        model.zero_grad()
        loss, grad = gradients(model, batch)
        assert torch.equal(loss, expected_loss)
        assert all(map(torch.equal, grad, expected))
        places = {linear.weight.data_ptr() for linear in first_linears(model.get_base_model())}
        assert len(places) == 2 + staying
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).loss, expected_loss)


def test_two_layers_are_on_the_device(checkpoint: Path) -> None:
    assert len({linear.weight.data_ptr() for linear in first_linears(streamed(checkpoint))}) == 2


def first_linears(causal: Any) -> list[Any]:
    return [quantized_linears(layer)[0] for layer in causal.model.layers]


def test_restoring_brings_the_weights_back(checkpoint: Path, batch: dict[str, torch.Tensor]) -> None:
    model = adapted(streamed(checkpoint))
    accelerate_model(model)
    restore_model(model)
    assert weight_stream_of(model.get_base_model()) is None
    loss, grad = gradients(model, batch)
    expected_loss, expected = gradients(adapted(resident(checkpoint)), batch)
    assert torch.equal(loss, expected_loss)
    assert all(map(torch.equal, grad, expected))


def test_a_forward_that_only_the_model_itself_could_train_is_refused(
    checkpoint: Path, batch: dict[str, torch.Tensor]
) -> None:
    model = adapted(streamed(checkpoint))
    accelerate_model(model)
    model.train()
    with pytest.raises(UnsupportedModelError, match="visit the device two at a time"):
        model(**batch, output_hidden_states=True)


def test_a_checkpoint_without_a_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    lost = max(name for name in tensors if name.startswith("model.layers.3.") and "norm" not in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors, model\.layers\.3\.self_attn\.v_proj"):
        streamed(tmp_path)
