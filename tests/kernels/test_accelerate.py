"""The engine computes what transformers + PEFT compute, under every plan, and undoes itself."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

from finemill.kernels.accelerate import accelerate_model, adopt_plan, restore_model, workload_of
from finemill.kernels.engine import decoder_layer
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.plan import Level, Plan
from finemill.kernels.ops.attention import attention_backward, attention_forward
from finemill.kernels.ops.packing import PackedBatch, pack_sequences
from finemill.models.causal_lm import load_causal_lm
from finemill.models.nf4.checkpoint import write_checkpoint
from finemill.models.nf4.layers import quantized_layers
from finemill.models.stored_model import StoredModel

SIZES: dict[str, Any] = {
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
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UNUSUAL: dict[str, Callable[[], PretrainedConfig]] = {
    **{f"head_dim {d}": partial(Qwen3Config, **SIZES, head_dim=d) for d in (64, 80, 96, 128, 256, 36)},
    **{
        f"{heads} over {kv} heads": partial(
            LlamaConfig,
            **{**SIZES, "hidden_size": 24 * heads, "num_attention_heads": heads, "num_key_value_heads": kv},
        )
        for heads, kv in ((1, 1), (3, 3), (8, 1), (6, 2), (5, 1), (7, 1))
    },
    "odd widths": lambda: Qwen2Config(**{**SIZES, "hidden_size": 68, "intermediate_size": 101, "head_dim": 34}),
    "biases everywhere": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "rope llama3": lambda: LlamaConfig(
        **SIZES, rope_parameters={**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}
    ),
    "rope linear": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "rope yarn": lambda: Qwen2Config(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
        },
    ),
    "more positions than the model has": lambda: LlamaConfig(**{**SIZES, "max_position_embeddings": 8}),
}
EXPERT_SIZES: dict[str, Any] = {**SIZES, "intermediate_size": 40}
QWEN3_MOE: dict[str, Any] = {
    **SIZES,
    "head_dim": 32,
    "moe_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN3_MOE),
    "qwen3_moe, weights as they are, one dense layer": lambda: Qwen3MoeConfig(
        **{**QWEN3_MOE, "norm_topk_prob": False, "num_experts_per_tok": 3, "mlp_only_layers": [1]}
    ),
    "mixtral": lambda: MixtralConfig(**EXPERT_SIZES, num_local_experts=6, num_experts_per_tok=2),
}
ATTENTION_AND_EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
Batch = dict[str, Any]
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A loss, and the gradients by name."""
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(config: PretrainedConfig, device: str, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return with_adapters(model, **lora).to(device).train()


def with_adapters(model: Any, **lora: Any) -> Any:
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, **lora}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def make_batch(device: str) -> Batch:
    """Three rows with padding on the right, prompts without labels."""
    ids = torch.randint(3, 128, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, 11:] = mask[2, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def loss_and_grads(model: Any, batch: Batch) -> Result:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def engine_of(model: Any, plan: Plan | None = None) -> FastModel:
    acceleration = accelerate_model(model, plan=plan)
    assert acceleration.engine is not None, acceleration.reason
    return acceleration.engine


def why_not(model: Any) -> str:
    reason = accelerate_model(model).reason
    assert reason is not None
    return reason


def assert_same(ours: Result, theirs: Result) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-8, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_transformers_and_peft(family: str, device: str) -> None:
    model, batch = make_model(FAMILIES[family](), device), make_batch(device)
    expected = loss_and_grads(model, batch)
    acceleration = accelerate_model(model)
    assert acceleration.active, acceleration.reason
    assert_same(loss_and_grads(model, batch), expected)
    restore_model(model)
    assert_same(loss_and_grads(model, batch), expected)


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_equal_transformers_and_peft(name: str, level: Level, device: str) -> None:
    model, batch = make_model(MIXTURES[name](), device, **ATTENTION_AND_EXPERTS), make_batch(device)
    expected = loss_and_grads(model, batch)
    engine_of(model, Plan((level,) * 3, (None,) * 3, 0, 1024))
    assert_same(loss_and_grads(model, batch), expected)
    restore_model(model)
    assert_same(loss_and_grads(model, batch), expected)


def test_a_base_in_4_bits_with_layers_in_16_is_covered(short_model_dir: Path, tmp_path: Path, device: str) -> None:
    stored = StoredModel(short_model_dir)
    kept = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    quantized = set(quantized_layers(stored)) - set(kept)
    write_checkpoint(stored, quantized, ["lm_head", *kept], torch.float32, tmp_path)
    model = load_causal_lm(tmp_path, device=torch.device(device), dtype=torch.float32)
    model = with_adapters(model).to(device).train()
    batch = make_batch(device)
    expected = loss_and_grads(model, batch)
    work = workload_of(engine_of(model), tokens=64, row=64)
    assert work.quantized
    assert work.kept_bytes > 4 * 256 * 512
    assert_same(loss_and_grads(model, batch), expected)
    restore_model(model)
    assert_same(loss_and_grads(model, batch), expected)


def test_experts_without_adapters_stay_frozen(device: str) -> None:
    config = Qwen3MoeConfig(**{**QWEN3_MOE, "num_hidden_layers": 2})
    model, batch = make_model(config, device, target_modules=["q_proj", "v_proj"]), make_batch(device)
    expected = loss_and_grads(model, batch)
    engine_of(model)
    assert_same(loss_and_grads(model, batch), expected)


def test_a_router_that_is_trained_or_has_a_loss_of_its_own_is_refused(device: str) -> None:
    model = make_model(MIXTURES["qwen3_moe"](), device, **ATTENTION_AND_EXPERTS)
    model.get_base_model().config.output_router_logits = True
    assert "auxiliary loss" in why_not(model)
    model.get_base_model().config.output_router_logits = False
    model.get_base_model().model.layers[0].mlp.gate.weight.requires_grad_(True)
    assert "other parameters are trainable" in why_not(model)


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_shapes_and_settings_of_the_families_are_covered(name: str, device: str) -> None:
    model, batch = make_model(UNUSUAL[name](), device), make_batch(device)
    expected = loss_and_grads(model, batch)
    acceleration = accelerate_model(model)
    assert acceleration.active, acceleration.reason
    assert_same(loss_and_grads(model, batch), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["k_proj", "up_proj"], "r": 7, "lora_alpha": 3},
        {"layers_to_transform": [1]},
        # alpha / r is equal again.
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}},
        {"rank_pattern": {"o_proj": 3, "down_proj": 5}, "alpha_pattern": {"o_proj": 30}},
        {"exclude_modules": ["v_proj"]},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_other_choices_of_adapters_are_covered(settings: dict[str, Any], device: str) -> None:
    model, batch = make_model(FAMILIES["qwen3"](), device, **settings), make_batch(device)
    expected = loss_and_grads(model, batch)
    acceleration = accelerate_model(model)
    assert acceleration.active, acceleration.reason
    assert_same(loss_and_grads(model, batch), expected)


def rows_of(kind: str) -> Batch:
    ids = torch.randint(3, 128, (3, 9))
    labels = ids.clone()
    match kind:
        case "single tokens":
            return {"input_ids": ids[:, :1], "labels": labels[:, :1]}
        case "a row without labels":
            labels[1] = -100
        case "no labels":
            labels[:] = -100
        case "labels at both ends":
            labels[:, 1:-1] = -100
        case "padding on the left":
            mask = torch.ones_like(ids)
            mask[0, :4] = mask[2, :7] = 0
            # transformers would have padding predict the row's first token.
            labels[0, :5] = labels[2, :8] = -100
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        case "packed":
            positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]]).expand(3, -1).contiguous()
            labels = labels.masked_fill(positions == 0, -100)
            return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("scale", [None, 100, torch.tensor(100)])
@pytest.mark.parametrize("kind", ["a row without labels", "labels at both ends", "padding on the left", "packed"])
def test_unusual_rows_and_the_count_that_scales_the_loss(
    kind: str, scale: int | torch.Tensor | None, device: str
) -> None:
    model = make_model(FAMILIES["llama"](), device)
    batch = {name: value.to(device) if name != "use_cache" else value for name, value in rows_of(kind).items()}
    batch |= {} if scale is None else {"num_items_in_batch": scale}
    expected = loss_and_grads(model, batch)
    accelerate_model(model)
    assert_same(loss_and_grads(model, batch), expected)


@pytest.mark.parametrize("kind", ["single tokens", "no labels"])
def test_a_batch_without_labels_has_no_gradient(kind: str, device: str) -> None:
    model = make_model(FAMILIES["llama"](), device)
    accelerate_model(model)
    loss, grads = loss_and_grads(model, {name: tensor.to(device) for name, tensor in rows_of(kind).items()})
    assert loss == 0
    assert all((grad == 0).all() for grad in grads.values())


def holes(batch: Batch) -> Batch:
    batch["attention_mask"][0, 5] = 0
    batch["labels"][0, 5:7] = -100
    return batch


def positions_too(batch: Batch) -> Batch:
    # With a mask, transformers attends across positions that start again.
    return batch | {"position_ids": (torch.arange(17) % 6).expand(3, -1).to(batch["input_ids"].device)}


def mask_4d(batch: Batch) -> Batch:
    device = batch["input_ids"].device
    mask = torch.zeros(3, 1, 17, 17, device=device)
    ban = torch.ones(17, 17, dtype=torch.bool, device=device)
    mask.masked_fill_(ban.triu(1) | ban.tril(-3), torch.finfo(torch.float32).min)
    return batch | {"attention_mask": mask}


def packed_with_a_cache(batch: Batch) -> Batch:
    # Without `use_cache=False` transformers attends across positions that start again here, too.
    batch = positions_too(batch)
    del batch["attention_mask"]
    return batch


def as_a_tuple(batch: Batch) -> Batch:
    return batch | {"return_dict": False}


@pytest.mark.parametrize("change", [holes, positions_too, packed_with_a_cache, mask_4d, as_a_tuple])
def test_batches_that_cannot_be_cut_into_rows_take_the_models_own_forward(
    change: Callable[[Batch], Batch], device: str
) -> None:
    model = make_model(FAMILIES["llama"](), device)
    batch = change(make_batch(device))
    model.zero_grad()
    expected = model(**batch)[0]
    accelerate_model(model)
    torch.testing.assert_close(model(**batch)[0], expected, rtol=0, atol=0)


def test_micro_batches_of_both_forwards_add_up(device: str) -> None:
    model, batch = make_model(FAMILIES["llama"](), device), make_batch(device)
    own = positions_too(batch)
    model(**own).loss.backward()
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for order in ((own, batch), (batch, own)):
        accelerate_model(model)
        model.zero_grad(set_to_none=True)
        for micro_batch in order:
            model(**micro_batch).loss.backward()
        for name, grad in expected.items():
            got = model.get_parameter(name).grad
            torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-8)


def test_rank_stabilized_scaling_and_partial_targets(device: str) -> None:
    settings = {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}}
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
    plain, batch = make_model(config, device, **{**settings, "rank_pattern": {}}), make_batch(device)
    expected = loss_and_grads(plain, batch)
    assert accelerate_model(plain).active
    assert_same(loss_and_grads(plain, batch), expected)
    # rsLoRA scales by 1 / sqrt(r): adapters of different rank over one input have different factors.
    mixed = make_model(config, device, **settings)
    assert "scalings" in why_not(mixed)


def test_every_plan_gives_bitwise_equal_gradients(device: str) -> None:
    model, batch = make_model(FAMILIES["qwen3"](), device), make_batch(device)
    layers = len(engine_of(model).layers)
    expected = loss_and_grads(model, batch)
    for level in Level:
        adopt_plan(model, Plan((level,) * layers, (None,) * layers, 0, head_chunk=1024))
        loss, grads = loss_and_grads(model, batch)
        assert torch.equal(loss, expected[0]), level
        assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items()), level


@pytest.mark.parametrize("level", [Level.INPUT, Level.ATTENDED, Level.ATTENTION])
def test_a_second_half_in_tiles_is_the_whole(level: Level, device: str) -> None:
    model, batch = make_model(FAMILIES["qwen3"](), device), make_batch(device)
    layers = len(engine_of(model).layers)
    expected = loss_and_grads(model, batch)
    adopt_plan(model, Plan((level,) * layers, (None,) * layers, 0, head_chunk=1024, mlp_tile=8))
    assert_same(loss_and_grads(model, batch), expected)


def test_tiles_have_dropout_masks_of_their_own_in_both_passes(ragged: PackedBatch, device: str) -> None:
    engine = engine_of(make_model(FAMILIES["qwen3"](), device, lora_dropout=0.3))
    engine.apply_plan(replace(engine.plan, levels=(Level.INPUT,) * len(engine.layers)))
    whole = engine.loss_and_grad(ragged, 1.0).loss
    engine.apply_plan(replace(engine.plan, mlp_tile=ragged.num_tokens // 3))
    adapters, step = engine.adapters, 1e-2
    adapters.grad.zero_()
    tiled = engine.loss_and_grad(ragged, 1.0).loss
    assert not torch.equal(tiled, whole)
    slope, direction = adapters.grad.clone(), adapters.grad / adapters.grad.norm()
    losses = []
    for sign in (1, -2):
        adapters.master.add_(direction, alpha=sign * step)
        losses.append(engine.loss_and_grad(ragged, 1.0).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope.norm(), rtol=0.02, atol=0)


def test_a_rehearsal_meets_every_call_of_attention_in_few_layers_and_leaves_the_gradient(
    ragged: PackedBatch, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(FAMILIES["qwen3"](), device, layers_to_transform=[0, 1])  # the last output has other pads
    engine = engine_of(model, Plan((Level.INPUT, Level.INPUT, Level.ALL), (None,) * 3, 0, 16))
    calls: list[tuple[Any, ...]] = []

    def spied(op: Callable[..., Any]) -> None:
        def run(*args: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            calls.append((op.__name__, *((tensor.shape, tensor.stride()) for tensor in tensors)))
            return op(*args)

        monkeypatch.setattr(decoder_layer, op.__name__, run)

    spied(attention_forward)
    spied(attention_backward)
    batch = ragged.to(engine.device)
    engine.adapters.grad.fill_(2.0)
    engine.rehearse_attention(batch, 0.0)
    rehearsed, calls = calls, []
    assert (engine.adapters.grad == 2.0).all()
    engine.loss_and_grad(batch, 1.0)
    assert set(rehearsed) == set(calls)
    assert len(rehearsed) < len(calls)


def test_packed_and_merged_batches_give_the_gradient_of_rows_one_by_one(device: str) -> None:
    engine = engine_of(make_model(FAMILIES["llama"](), device))
    rows = [torch.randint(3, 128, (length,)) for length in (9, 4, 13)]
    pairs = [(row, row.clone()) for row in rows]

    def gradient(batches: list[PackedBatch]) -> torch.Tensor:
        engine.adapters.grad.zero_()
        for batch in batches:
            engine.loss_and_grad(batch.to(engine.device), 1.0 / 23)
        return engine.adapters.grad.clone()

    one_by_one = gradient([pack_sequences([pair]) for pair in pairs])
    merged = gradient([pack_sequences(pairs)])
    torch.testing.assert_close(merged, one_by_one, rtol=1e-4, atol=1e-6 * one_by_one.abs().max().item())


def test_dropout_replays_its_mask_and_changes_with_every_batch(device: str) -> None:
    model, batch = make_model(FAMILIES["llama"](), device, lora_dropout=0.3), make_batch(device)
    engine = engine_of(model)
    assert engine.dropout_seed is not None
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


def test_evaluation_and_calls_without_labels_take_the_models_own_forward(device: str) -> None:
    model, batch = make_model(FAMILIES["qwen3"](), device), make_batch(device)
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
    accelerate_model(model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"]).logits, expected)
    assert model(input_ids=batch["input_ids"]).logits is not None


def test_training_through_the_engine_is_seen_by_peft_after_restoring(device: str) -> None:
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


REFUSED: dict[str, Callable[[Any], object]] = {
    "hidden_act is 'gelu'": lambda model: model.config.__setattr__("hidden_act", "gelu"),
    "other parameters are trainable": lambda model: model.get_input_embeddings().weight.requires_grad_(True),
    "scores are scaled by 0.5": lambda model: model.model.layers[2].self_attn.__setattr__("scaling", 0.5),
    "NEFTune": lambda model: model.get_input_embeddings().__setattr__("neftune_noise_alpha", 5.0),
    "computes in float64": lambda model: model.double(),
    "float32, the final norm bfloat16": lambda model: model.model.norm.bfloat16(),
    "is a Conv1D": lambda model: model.model.layers[1].mlp.up_proj.__setattr__("base_layer", Conv1D(96, 64)),
    "has a frozen adapter": lambda model: (
        model.model.layers[0].self_attn.k_proj.lora_A["default"].weight.requires_grad_(False)
    ),
    "switched off": lambda model: model.model.layers[0].self_attn.q_proj.enable_adapters(False),
    "final norm on": lambda model: model.lm_head.to("meta"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_covered_runs_unchanged_and_says_why(
    reason: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(FAMILIES["llama"](), device)
    REFUSED[reason](model.get_base_model())
    forward = model.get_base_model().forward
    acceleration = accelerate_model(model)
    assert not acceleration.active
    assert reason in (acceleration.reason or "")
    assert reason in caplog.text
    assert model.get_base_model().forward == forward
    accelerate_model(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("is not plain LoRA", {"use_dora": True}),
        ("other parameters are trainable", {"bias": "all"}),
        ("other parameters are trainable", {"bias": "lora_only"}),
        ("is not plain LoRA", {"lora_bias": True}),
        ("other parameters are trainable", {"modules_to_save": ["lm_head"]}),
        ("other parameters are trainable", {"modules_to_save": ["norm"]}),
        ("other parameters are trainable", {"target_modules": [*ALL_LINEAR, "lm_head"]}),
        ("other parameters are trainable", {"target_modules": [*ALL_LINEAR, "embed_tokens"]}),
        ("other parameters are trainable", {"trainable_token_indices": [1, 2]}),
        ("have scalings", {"alpha_pattern": {"k_proj": 1}}),
        ("has a frozen adapter", {"inference_mode": True}),
    ],
)
def test_adapters_that_are_not_covered_are_refused(reason: str, settings: dict[str, Any], device: str) -> None:
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    assert reason in why_not(make_model(config, device, **settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tuner", ["AdaLoraConfig", "LoHaConfig", "IA3Config", "VeraConfig"])
def test_other_tuners_are_refused(tuner: str, device: str) -> None:
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.float32)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    settings |= {"feedforward_modules": []} if tuner == "IA3Config" else {}
    settings |= {"total_step": 10} if tuner == "AdaLoraConfig" else {}
    model = get_peft_model(base, getattr(peft, tuner)(**settings)).to(device).train()
    assert not accelerate_model(model).active


@pytest.mark.parametrize(
    ("reason", "config"),
    [
        ("sliding_window is 8", MistralConfig(**SIZES, sliding_window=8)),
        ("sliding_window is 8", Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
        ("attention_dropout is 0.1", LlamaConfig(**SIZES, attention_dropout=0.1)),
        (
            "rope_type is 'dynamic'",
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ),
        (
            "rope_type is 'longrope'",
            LlamaConfig(
                **SIZES,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        ),
    ],
)
def test_configurations_that_change_the_maths_are_refused(reason: str, config: PretrainedConfig, device: str) -> None:
    assert reason in why_not(make_model(config, device))


def test_other_families_and_heads_run_unchanged(device: str) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).to(device)
    assert "model_type is 'gpt2'" in why_not(model)
    classifier = AutoModelForSequenceClassification.from_config(FAMILIES["llama"]()).to(device)
    assert "causal language models" in why_not(classifier)

    class Scaled(LlamaForCausalLM):  # type: ignore[misc]
        """A class of the user's own, with a family's configuration."""

    assert "Scaled" in why_not(Scaled(FAMILIES["llama"]()))


def quantize(
    model: Any,
    device: str,
    choose: Callable[[str], bool] = lambda name: True,
    compute_dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """Put bitsandbytes' 4-bit layers in place of chosen base layers."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if name.endswith("base_layer") and choose(name):
            has_bias = module.bias is not None
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=has_bias, compute_dtype=compute_dtype
            )
            weight = module.weight.data
            layer.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, **{"quant_type": "nf4", "compress_statistics": True, **settings}
            )
            if has_bias:
                layer.bias = module.bias
            layer.support_avx512bf16_for_cpu = False  # the CPU's packed forward has no gradient
            model.get_submodule(name.rpartition(".")[0]).base_layer = layer.to(device)
    return model.to(device)


WIDE = {**SIZES, "intermediate_size": 128}
"""Widths that blocks of 64 do not cross: bitsandbytes' CPU decode is wrong there (test_nf4.py)."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compress_statistics": False},
        {"quant_storage": torch.float32},
        {"quant_storage": torch.bfloat16},
        {"blocksize": 32},
        {"choose": lambda name: "q_proj" not in name},
        {"choose": lambda name: "k_proj" not in name and "up_proj" not in name},
        {"choose": lambda name: "layers.1" in name},
    ],
    ids=[
        "nf4",
        "fp32 scales",
        "float32 storage",
        "bfloat16 storage",
        "blocks of 32",
        "16-bit q",
        "16-bit k, up",
        "one layer",
    ],
)
def test_nf4_bases_of_every_kind_give_the_same_loss_and_gradients_and_survive(
    settings: dict[str, Any], device: str
) -> None:
    pytest.importorskip("bitsandbytes")
    model = quantize(make_model(Qwen2Config(**WIDE), "cpu"), device, **settings)
    batch = make_batch(device)
    expected = loss_and_grads(model, batch)
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    acceleration = accelerate_model(model)
    assert acceleration.active, acceleration.reason
    assert_same(loss_and_grads(model, batch), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"]).logits, logits)
    restore_model(model)
    assert_same(loss_and_grads(model, batch), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("quant_type is 'fp4'", {"quant_type": "fp4"}),
        ("computes in float16", {"compute_dtype": torch.float16}),
        ("computes in bfloat16", {"compute_dtype": torch.bfloat16}),
    ],
)
def test_other_four_bit_bases_are_refused(reason: str, settings: dict[str, Any], device: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = quantize(make_model(Qwen2Config(**WIDE), "cpu"), device, **settings)
    assert reason in why_not(model)


@pytest.mark.filterwarnings("ignore")
def test_a_base_with_norms_in_float32_is_refused(device: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = make_model(Qwen2Config(**WIDE), "cpu").bfloat16()
    model = quantize(model, device, compute_dtype=torch.bfloat16)
    assert accelerate_model(model).active
    restore_model(model)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and not parameter.requires_grad:
            parameter.data = parameter.data.float()  # as peft.prepare_model_for_kbit_training does
    assert "computes in bfloat16" in why_not(model)


def test_an_adapter_that_is_switched_later_is_the_one_that_trains(device: str) -> None:
    model, batch = make_model(FAMILIES["llama"](), device), make_batch(device)
    accelerate_model(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    _, grads = loss_and_grads(model, batch)
    assert grads
    assert all("second" in name for name in grads)
    model.set_adapter("default")
    with model.disable_adapter():
        assert model(**batch).loss.grad_fn is None


def test_a_second_acceleration_is_the_first_and_a_copy_has_its_own(device: str) -> None:
    model, batch = make_model(FAMILIES["llama"](), device), make_batch(device)
    first = engine_of(model)
    assert engine_of(model) is first
    expected = loss_and_grads(model, batch)
    twin = copy.deepcopy(model)
    first.adapters.master.zero_()
    assert_same(loss_and_grads(twin, batch), expected)
    assert twin.get_base_model()._finemill_engine is not first


def test_restoring_brings_back_a_forward_that_another_library_put_there(device: str) -> None:
    model = make_model(FAMILIES["llama"](), device).get_base_model()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    theirs = model.forward
    accelerate_model(model)
    assert model.forward is not theirs
    restore_model(model)
    assert model.forward is theirs


def test_the_planner_sees_the_largest_rank_of_all_layers() -> None:
    model = make_model(FAMILIES["llama"](), "cpu", r=4, layers_to_transform=[2])
    assert workload_of(engine_of(model), tokens=64, row=32).rank == 4
