"""The engine computes what transformers + PEFT compute, under every plan, and undoes itself."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from finemill.kernels.accelerate import accelerate_model, adopt_plan, restore_model
from finemill.kernels.decoder_layer import Level
from finemill.kernels.packing import pack_sequences
from finemill.kernels.planner import Plan

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(config: PretrainedConfig, device: str, **lora: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, **lora}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.to(device).train()


def make_batch(device: str) -> dict[str, torch.Tensor]:
    """Three rows with padding on the right, prompts without labels."""
    ids = torch.randint(3, 128, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, 11:] = mask[2, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def loss_and_grads(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-8, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_transformers_and_peft(family, device):
    model, batch = make_model(FAMILIES[family](), device), make_batch(device)
    expected = loss_and_grads(model, batch)
    acceleration = accelerate_model(model)
    assert acceleration.active, acceleration.reason
    assert_same(loss_and_grads(model, batch), expected)
    restore_model(model)
    assert_same(loss_and_grads(model, batch), expected)


def test_rank_stabilized_scaling_and_partial_targets(device):
    settings = {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}}
    config = FAMILIES["llama"]()
    plain, batch = make_model(config, device, **{**settings, "rank_pattern": {}}), make_batch(device)
    expected = loss_and_grads(plain, batch)
    assert accelerate_model(plain).active
    assert_same(loss_and_grads(plain, batch), expected)
    # rsLoRA scales by 1 / sqrt(r): adapters of different rank over one input have different factors.
    mixed = make_model(config, device, **settings)
    assert "scalings" in accelerate_model(mixed).reason


@pytest.mark.filterwarnings("ignore")
def test_an_nf4_base_gives_the_same_loss_and_gradients(device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # 128 and not 96: bitsandbytes' CPU decode is wrong where a block of 64 crosses rows (test_nf4.py).
    model = make_model(Qwen3Config(**{**SIZES, "intermediate_size": 128}, head_dim=32), "cpu")
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer"):
            quantized = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantized.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            quantized.support_avx512bf16_for_cpu = False  # the CPU's packed forward has no gradient
            model.get_submodule(name.rpartition(".")[0]).base_layer = quantized.to(device)
    model.to(device)
    batch = make_batch(device)
    expected = loss_and_grads(model, batch)
    assert accelerate_model(model).active
    assert_same(loss_and_grads(model, batch), expected)


def test_every_plan_gives_bitwise_equal_gradients(device):
    model, batch = make_model(FAMILIES["qwen3"](), device), make_batch(device)
    acceleration = accelerate_model(model)
    expected = loss_and_grads(model, batch)
    layers = len(acceleration.engine.layers)
    for level in Level:
        adopt_plan(model, Plan((level,) * layers, (None,) * layers, 0, head_chunk=1024))
        loss, grads = loss_and_grads(model, batch)
        assert torch.equal(loss, expected[0]), level
        assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items()), level


def test_packed_and_merged_batches_give_the_gradient_of_rows_one_by_one(device):
    model = make_model(FAMILIES["llama"](), device)
    engine = accelerate_model(model).engine
    rows = [torch.randint(3, 128, (length,)) for length in (9, 4, 13)]
    pairs = [(row, row.clone()) for row in rows]

    def gradient(batches: list) -> torch.Tensor:
        engine.adapters.grad.zero_()
        for batch in batches:
            engine.loss_and_grad(batch.to(engine.device), 1.0 / 23)
        return engine.adapters.grad.clone()

    one_by_one = gradient([pack_sequences([pair]) for pair in pairs])
    merged = gradient([pack_sequences(pairs)])
    torch.testing.assert_close(merged, one_by_one, rtol=1e-4, atol=1e-6 * one_by_one.abs().max().item())


def test_dropout_replays_its_mask_and_changes_with_every_batch(device):
    model, batch = make_model(FAMILIES["llama"](), device, lora_dropout=0.3), make_batch(device)
    engine = accelerate_model(model).engine
    seed = engine.dropout_seed.clone()
    first = loss_and_grads(model, batch)
    second = loss_and_grads(model, batch)
    assert first[0] != second[0]
    engine.dropout_seed.copy_(seed)
    assert torch.equal(loss_and_grads(model, batch)[0], first[0])

    # The gradient is that of the loss with this mask: a step along it lowers the loss by its square.
    engine.dropout_seed.copy_(seed)
    step = 1e-3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.sub_(step * first[1][name])
    lower = loss_and_grads(model, batch)[0]
    slope = sum(grad.square().sum() for grad in first[1].values())
    torch.testing.assert_close(first[0] - lower, step * slope, rtol=0.05, atol=0.0)


def test_evaluation_and_calls_without_labels_take_the_models_own_forward(device):
    model, batch = make_model(FAMILIES["qwen3"](), device), make_batch(device)
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
    accelerate_model(model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"]).logits, expected)
    assert model(input_ids=batch["input_ids"]).logits is not None


def test_training_through_the_engine_is_seen_by_peft_after_restoring(device):
    model, batch = make_model(FAMILIES["mistral"](), device), make_batch(device)
    twin = copy.deepcopy(model)
    accelerate_model(model)
    for candidate in (model, twin):
        optimizer = torch.optim.SGD([p for p in candidate.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            candidate(**batch).loss.backward()
            optimizer.step()
    restore_model(model)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.config.__setattr__("hidden_act", "gelu"), "hidden_act is 'gelu'"),
        (lambda model: model.get_input_embeddings().weight.requires_grad_(True), "other parameters are trainable"),
    ],
)
def test_what_is_not_covered_runs_unchanged_and_says_why(change, reason, device, caplog):
    model = make_model(FAMILIES["llama"](), device)
    change(model.get_base_model())
    forward = model.get_base_model().forward
    acceleration = accelerate_model(model)
    assert not acceleration.active
    assert reason in acceleration.reason
    assert reason in caplog.text
    assert model.get_base_model().forward == forward


def test_other_families_run_unchanged(device):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).to(device)
    assert "model_type is 'gpt2'" in accelerate_model(model).reason
