import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_dpo.step import build_trainer
from finemill.components.train_dpo.step import run as train_dpo
from finemill.components.train_dpo.trainers import TokenizedDPOTrainer
from finemill.errors import TemporaryError, UserError
from finemill.runtime.context import StepContext
from finemill.training.inputs import TrainingInputs
from tests.recorder import recorded

CONFIG = TrainDPOConfig(
    lora_r=4,
    max_steps=6,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=2e-3,
    logging_steps=3,
    gradient_checkpointing=False,
    save_steps=None,
)
MakeContext = Callable[[], StepContext]
Trained = tuple[Path, StepContext, dict[str, float]]
Uninterrupted = Callable[[MakeContext], Trained]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_dir: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The same training without a stop, run once for the tests of this file."""
    done: list[Trained] = []

    def run(make_context: MakeContext) -> Trained:
        if not done:
            folder, context = tmp_path_factory.mktemp("adapter"), make_context()
            metrics = train_dpo(
                base_model=tiny_model_dir, dataset=preferences, output_dir=folder, config=CONFIG, context=context
            )
            done.append((folder, context, metrics))
        return done[0]

    return run


def test_learns_to_prefer_and_records_rewards_live(uninterrupted: Uninterrupted, make_context: MakeContext) -> None:
    _, context, metrics = uninterrupted(make_context)
    points = [values for _, values in recorded(context).points]
    # Adapters begin at zero: policy and reference are the same model, and the loss is that of a coin.
    assert points[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert points[0]["train/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert {"train/rewards/accuracies", "train/rewards/chosen", "train/rewards/rejected"} <= points[0].keys()
    assert metrics["train/rewards/margins"] > 0.05
    assert metrics["train/loss"] < math.log(2)
    assert metrics["train/rewards/accuracies"] == points[-1]["train/rewards/accuracies"]
    assert all(math.isfinite(value) for value in metrics.values())


def test_writes_an_adapter_that_peft_loads(
    uninterrupted: Uninterrupted, make_context: MakeContext, tiny_model_dir: Path
) -> None:
    folder, _, _ = uninterrupted(make_context)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert any("lora_A" in name for name, _ in PeftModel.from_pretrained(base, folder).named_parameters())
    assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_the_trainer_s_batches_are_the_pairs_and_the_base_is_its_own_reference(
    tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    inputs = TrainingInputs(tiny_model_dir, preferences, tokenizer, torch.device("cpu"))
    trainer = build_trainer(inputs, tmp_path, CONFIG)
    assert trainer.ref_model is None
    pair = trainer.train_dataset[0]
    batch = trainer.data_collator([pair])
    for ids, mask, answer in zip(
        batch["input_ids"], batch["attention_mask"], (pair["chosen_ids"], pair["rejected_ids"]), strict=True
    ):
        assert ids[mask.bool()].tolist() == pair["prompt_ids"] + answer


def test_sigterm_saves_a_checkpoint_and_resuming_equals_an_uninterrupted_run(
    uninterrupted: Uninterrupted, make_context: MakeContext, tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    def terminate_at_step_3(text: str) -> None:
        if text.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    context = make_context()
    recorded(context).on_progress = terminate_at_step_3
    arguments: dict[str, Any] = {"base_model": tiny_model_dir, "dataset": preferences, "config": CONFIG}
    with pytest.raises(TemporaryError, match="stopped at step 4"):
        train_dpo(**arguments, output_dir=tmp_path / "first", context=context)
    assert not (tmp_path / "first").exists()

    resumed = make_context()
    train_dpo(**arguments, output_dir=tmp_path / "second", context=resumed)
    assert [step for step, values in recorded(resumed).points if "train/loss" in values] == [6]
    expected = uninterrupted(make_context)[0]
    # The means of the curve's last point begin before the stop.
    for name in ("adapter_model.safetensors", "training.json"):
        assert (tmp_path / "second" / name).read_bytes() == (expected / name).read_bytes(), name


def test_reference_scores_made_before_give_the_same_training(
    uninterrupted: Uninterrupted, make_context: MakeContext, tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"precompute_ref_log_probs": True, "max_steps": 2, "eval_steps": 2})
    context = make_context()
    train_dpo(base_model=tiny_model_dir, dataset=preferences, output_dir=tmp_path, config=config, context=context)
    (first, *_), (expected, *_) = recorded(context).points, recorded(uninterrupted(make_context)[1]).points
    assert first[1]["train/loss"] == pytest.approx(expected[1]["train/loss"], abs=1e-4)
    assert {"validation/loss", "validation/rewards/accuracies"} <= set().union(
        *(v for _, v in recorded(context).points)
    )


def test_a_loss_that_is_no_number_stops_the_training(
    make_context: MakeContext, tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0.0})
    with pytest.raises(
        UserError, match=r"\(step [12], rows .* of train\): lower learning_rate \(now 1e\+30\)"
    ) as error:
        train_dpo(
            base_model=tiny_model_dir, dataset=preferences, output_dir=tmp_path, config=config, context=make_context()
        )
    assert "\n" not in str(error.value)


def test_out_of_gpu_memory_goes_on_with_fewer_pairs_per_pass(
    uninterrupted: Uninterrupted,
    make_context: MakeContext,
    tiny_model_dir: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = uninterrupted(make_context)[2]
    step = TokenizedDPOTrainer.training_step

    def short_of_memory(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) > 2 * 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        loss: torch.Tensor = step(self, model, inputs, *rest)
        return loss

    monkeypatch.setattr(TokenizedDPOTrainer, "training_step", short_of_memory)
    metrics = train_dpo(
        base_model=tiny_model_dir, dataset=preferences, output_dir=tmp_path, config=CONFIG, context=make_context()
    )
    assert "2 sequences per forward pass from here on, and 2 passes per step" in caplog.text
    assert metrics["train/num_steps"] == CONFIG.max_steps
    assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)
    monkeypatch.setattr(TokenizedDPOTrainer, "training_step", lambda *_: _out_of_memory())
    comparing = CONFIG.model_copy(update={"loss_type": "aot"})
    for config, advice in (
        (CONFIG, "lower max_length"),
        (comparing, r"lower per_device_train_batch_size \(4\), max_len"),
    ):
        with pytest.raises(UserError, match=rf"out of GPU memory \(CUDA out of memory.*: {advice}"):
            train_dpo(
                base_model=tiny_model_dir,
                dataset=preferences,
                output_dir=tmp_path,
                config=config,
                context=make_context(),
            )


@pytest.mark.parametrize("loss_type", get_args(TrainDPOConfig.model_fields["loss_type"].annotation))
def test_every_loss_learns_and_its_adapter_opens_in_peft(
    loss_type: str, make_context: MakeContext, tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    values = CONFIG.model_dump(exclude_unset=True) | {"loss_type": loss_type, "max_steps": 4, "eval_steps": 2}
    values |= {"load_in_4bit": False}
    values |= {"sppo_hard": {"beta": 1.0}, "exo_pair": {"label_smoothing": 1e-3}}.get(loss_type, {})
    if loss_type in ("sppo_hard", "discopop"):  # which begin more slowly
        values |= {"max_steps": 8, "eval_steps": 4}
    config, context = TrainDPOConfig.model_validate(values), make_context()
    train_dpo(base_model=tiny_model_dir, dataset=preferences, output_dir=tmp_path, config=config, context=context)
    points = [values for _, values in recorded(context).points]
    measured = [values["validation/loss"] for values in points if "validation/loss" in values]
    assert measured[-1] < measured[0]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    PeftModel.from_pretrained(base, tmp_path)


def test_an_sft_term_is_the_loss_of_the_chosen_answers_times_its_weight(
    make_context: MakeContext, tiny_model_dir: Path, preferences: Path, tmp_path: Path
) -> None:
    losses = []
    for weight in (0.0, 1.0, 2.0):
        context = make_context()
        config = CONFIG.model_copy(update={"sft_weight": weight, "max_steps": 1})
        train_dpo(
            base_model=tiny_model_dir,
            dataset=preferences,
            output_dir=tmp_path / str(weight),
            config=config,
            context=context,
        )
        losses.append(recorded(context).points[0][1]["train/loss"])
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


def _out_of_memory() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")
