"""What a preference's trainer asks of a model, the engine answers as TRL's fused head does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from finemill.kernels.accelerate import accelerate_model, restore_model
from finemill.kernels.engine.plan import Plan
from finemill.kernels.engine.shapes import Buckets, Shapes
from tests.kernels.test_accelerate import ATTENTION_AND_EXPERTS, FAMILIES, MIXTURES, make_batch, make_model, rows_of

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
Scores = dict[str, torch.Tensor]


def with_fused_head(config: PretrainedConfig, device: str, **lora: Any) -> PeftModel:
    model = make_model(config, device, **lora)
    add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    return model


def scores(model: PeftModel, batch: dict[str, Any]) -> Scores:
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    return {name: getattr(outputs, name) for name in ("loss", *FIELDS)}


def ask_as_dpo(model: PeftModel, batch: dict[str, Any]) -> tuple[Scores, Scores, Scores]:
    """Scores of the model and of its reference, and the gradients of a loss that has both."""
    model.zero_grad(set_to_none=True)
    ours = scores(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference = scores(model, batch)
    margins = (ours["log_probs"] - reference["log_probs"]).sum(1)
    torch.nn.functional.logsigmoid(margins).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach() for name, value in ours.items()}, reference, grads


def assert_equal(got: tuple[Scores, ...], expected: tuple[Scores, ...]) -> None:
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name, grad in expected[2].items():
        torch.testing.assert_close(got[2][name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-8, msg=name)


MODELS: dict[str, Callable[[str], PeftModel]] = {
    **{name: partial(lambda make, device: with_fused_head(make(), device), make) for name, make in FAMILIES.items()},
    "qwen3_moe": lambda device: with_fused_head(MIXTURES["qwen3_moe"](), device, **ATTENTION_AND_EXPERTS),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_model_and_reference_and_gradients_equal_trls(name: str, device: str) -> None:
    model, batch = MODELS[name](device), make_batch(device)
    expected = ask_as_dpo(model, batch)
    accelerate_model(model)
    assert_equal(ask_as_dpo(model, batch), expected)
    restore_model(model)
    assert_equal(ask_as_dpo(model, batch), expected)


@pytest.mark.parametrize("cached", [False, True])
def test_a_reference_between_forward_and_backward_changes_nothing(cached: bool, device: str) -> None:
    model, batch = MODELS["qwen3"](device), make_batch(device)
    expected = ask_as_dpo(model, batch)
    accelerate_model(model, plan=Plan.everything(3, cached=cached))
    assert_equal(ask_as_dpo(model, batch), expected)


@pytest.mark.parametrize("kind", ["single tokens", "no labels", "labels at both ends", "padding on the left"])
def test_unusual_rows(kind: str, device: str) -> None:
    model = MODELS["llama"](device)
    batch = {name: value.to(device) for name, value in rows_of(kind).items()}
    expected = ask_as_dpo(model, batch)
    accelerate_model(model)
    assert_equal(ask_as_dpo(model, batch), expected)


def test_batches_of_rounded_shapes_are_scored_the_same(device: str) -> None:
    model, batch = MODELS["qwen3"](device), make_batch(device)
    expected = ask_as_dpo(model, batch)
    accelerate_model(model)
    model.get_base_model()._finemill_scorer.shapes = Shapes(Buckets(64, 64))
    assert_equal(ask_as_dpo(model, batch), expected)


def test_neither_reference_nor_evaluation_drops_anything(device: str) -> None:
    model, batch = with_fused_head(FAMILIES["llama"](), device, lora_dropout=0.5), make_batch(device)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        reference = scores(model, batch)
    with torch.no_grad():
        own = scores(model, batch)
    accelerate_model(model.train())
    trained = scores(model, batch)["log_probs"]
    assert not torch.equal(trained, scores(model, batch)["log_probs"])
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(scores(model, batch)["log_probs"], reference["log_probs"])
    with torch.no_grad():
        torch.testing.assert_close(scores(model, batch)["log_probs"], own["log_probs"])


def test_a_second_adapter_is_scored_by_the_models_own_layers(device: str) -> None:
    model, batch = MODELS["llama"](device), make_batch(device)
    accelerate_model(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    with torch.no_grad():
        own = scores(model, batch)["log_probs"]
        with model.disable_adapter():
            torch.testing.assert_close(scores(model, batch)["log_probs"], own)
