import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from finemill.artifacts.adapter import read_training
from finemill.artifacts.dataset import LabelledRow
from finemill.artifacts.splits import split_path
from finemill.artifacts.tables import write_rows
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.step import run as train_qlora
from finemill.errors import TemporaryError, UserError
from finemill.runtime.context import Checkpoints, StepContext
from tests.recorder import recorded

CONFIG = TrainQLoRAConfig(
    lora_r=4,
    max_steps=6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    learning_rate=1e-3,
    logging_steps=3,
    gradient_checkpointing=False,
    save_steps=None,
)
MakeContext = Callable[[], StepContext]
Trained = tuple[Path, StepContext, dict[str, float]]
Uninterrupted = Callable[[MakeContext], Trained]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(found: Path, expected: Path) -> None:
    for name, weight in adapter_weights(expected).items():
        torch.testing.assert_close(adapter_weights(found)[name], weight, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def uninterrupted(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """The same training without a stop, run once for the tests of this file."""
    done: list[Trained] = []

    def run(make_context: MakeContext) -> Trained:
        if not done:
            folder, context = tmp_path_factory.mktemp("adapter"), make_context()
            metrics = train_qlora(
                base_model=base_model, dataset=dataset, output_dir=folder, config=CONFIG, context=context
            )
            done.append((folder, context, metrics))
        return done[0]

    return run


def test_writes_an_adapter_that_peft_loads(
    uninterrupted: Uninterrupted, make_context: MakeContext, base_model: Path
) -> None:
    folder, _, _ = uninterrupted(make_context)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert AutoTokenizer.from_pretrained(folder).chat_template == (base_model / "chat_template.jinja").read_text()
    assert {weight.dtype for weight in adapter_weights(folder).values()} == {torch.float32}


def test_adapter_names_its_base_by_reference_and_holds_no_path(
    uninterrupted: Uninterrupted, make_context: MakeContext
) -> None:
    folder, _, _ = uninterrupted(make_context)
    adapter_config = json.loads((folder / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == "builtin:tiny-qwen3"
    # Neither the order of a set nor how fast this machine is: a repeat writes the same bytes.
    assert adapter_config["target_modules"] == sorted(adapter_config["target_modules"])
    assert not re.search(r"_runtime|_per_second", (folder / "training.json").read_text())
    for path in folder.glob("*.json"):
        assert str(Path.home()) not in path.read_text()


def test_records_the_loss_curve_and_returns_finite_metrics(
    uninterrupted: Uninterrupted, make_context: MakeContext
) -> None:
    folder, context, metrics = uninterrupted(make_context)
    steps = [step for step, values in recorded(context).points if "train/loss" in values]
    assert steps == [1, 3, 6]
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(recorded(context).points[0][1])
    assert metrics["train/num_steps"] == 6
    assert all(math.isfinite(value) for value in metrics.values())
    training = read_training(folder)
    assert training is not None
    assert (training.max_steps, training.num_steps) == (6, 6)
    assert training.training_losses[-1] == (6, metrics["train/loss"])


def test_sigterm_saves_a_checkpoint_and_resuming_equals_an_uninterrupted_run(
    uninterrupted: Uninterrupted, make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    def terminate_at_step_3(text: str) -> None:
        if text.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    context = make_context()
    recorded(context).on_progress = terminate_at_step_3
    arguments: dict[str, Any] = {"base_model": base_model, "dataset": dataset, "config": CONFIG}
    with pytest.raises(TemporaryError, match="stopped at step 4"):
        train_qlora(**arguments, output_dir=tmp_path / "first", context=context)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "first").exists()

    resumed = make_context()
    found = train_qlora(**arguments, output_dir=tmp_path / "second", context=resumed)
    assert [step for step, values in recorded(resumed).points if "train/loss" in values] == [6]
    expected, _, metrics = uninterrupted(make_context)
    assert_same_adapter(tmp_path / "second", expected)
    # The means of the curve's last point begin before the stop.
    assert (tmp_path / "second" / "training.json").read_bytes() == (expected / "training.json").read_bytes()
    assert found["train/num_tokens"] == metrics["train/num_tokens"]
    assert found["train/num_tokens"] > 2 * found["train/tokens_per_second"] * found["train/seconds"]


def test_a_checkpoint_of_another_training_is_refused(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    with_checkpoint = CONFIG.model_copy(update={"save_steps": 1, "max_steps": 2})
    arguments: dict[str, Any] = {"base_model": base_model, "dataset": dataset}
    context = make_context()
    train_qlora(**arguments, output_dir=tmp_path / "a", config=with_checkpoint, context=context)
    assert [line for line in recorded(context).lines if "checkpoint" in line] == ["checkpoint at step 1"]
    other = with_checkpoint.model_copy(update={"learning_rate": 5e-4})
    with pytest.raises(
        UserError, match=r"another training, different in config\.learning_rate \(then 0\.001, now 0\.0005\)"
    ):
        train_qlora(**arguments, output_dir=tmp_path / "b", config=other, context=make_context())


def test_checkpoints_come_by_time_as_long_as_they_cost_little(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(share: float) -> list[str]:
        monkeypatch.setattr("finemill.training.checkpoint.SAVE_SHARE", share)
        context = make_context()
        config = CONFIG.model_copy(update={"save_steps": "auto", "max_steps": 4, "resume": "never"})
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / str(share), config=config, context=context
        )
        return [line for line in recorded(context).lines if "checkpoint" in line]

    assert saved(0.02) == []
    monkeypatch.setattr("finemill.training.checkpoint.FIRST_SAVE_S", 0.0)
    assert saved(1e9) == [f"checkpoint at step {step}" for step in (1, 2, 3)]
    assert saved(1e-9) == ["checkpoint at step 1"]


def test_training_goes_on_while_a_checkpoint_is_published(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on, save = threading.Event(), Checkpoints.save

    def slow(self: Checkpoints, folder: Path, training_step: int) -> None:
        assert went_on.wait(timeout=60), "no step was taken meanwhile"
        save(self, folder, training_step)

    def step(*arguments: Any) -> Any:
        if recorded(context).points:  # the first step was logged, before its checkpoint was begun
            went_on.set()
        return training_step(*arguments)

    training_step = SFTTrainer.training_step
    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(SFTTrainer, "training_step", step)
    context = make_context()
    config = CONFIG.model_copy(update={"save_steps": 1, "max_steps": 3, "logging_steps": 1})
    metrics = train_qlora(
        base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=context
    )
    assert [line for line in recorded(context).lines if "checkpoint" in line] == [
        "checkpoint at step 1",
        "checkpoint at step 2",
    ]
    assert 0 < metrics["train/checkpoint_seconds"] < metrics["train/seconds"]


def test_a_checkpoint_that_cannot_be_published_ends_the_training(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Checkpoints, folder: Path, training_step: int) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(Checkpoints, "save", full)
    config = CONFIG.model_copy(update={"save_steps": 1, "max_steps": 2})
    with pytest.raises(UserError, match="the disk is full"):
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=make_context()
        )


def test_resume_must_needs_a_checkpoint(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"resume": "must"})
    with pytest.raises(UserError, match="resume: must"):
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=make_context()
        )


def test_a_loss_that_is_no_number_stops_the_training(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0.0})
    with pytest.raises(UserError, match=r"\(step [12], rows .* of train\): lower learning_rate \(now 1e\+30\)"):
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=make_context()
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on this machine's GPU")
def test_kernels_on_needs_a_gpu(make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"kernels": "on"})
    with pytest.raises(UserError, match=r"kernels: on, but they cannot run here \(there is no GPU\)"):
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=make_context()
        )


def test_packing_and_validation_loss(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"packing": True, "max_length": 256, "max_steps": 2, "eval_steps": 1})
    context = make_context()
    train_qlora(base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=context)
    assert [step for step, values in recorded(context).points if "validation/loss" in values] == [1, 2]


OPTIMIZERS = [name for name in get_args(TrainQLoRAConfig.model_fields["optim"].annotation) if name != "auto"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_optimizer_that_is_named_is_the_one_that_learns(
    make_context: MakeContext, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    def losses(optim: str) -> tuple[float, ...]:
        config = CONFIG.model_copy(
            update={"optim": optim, "max_steps": 4, "warmup_steps": 0.0, "learning_rate": 2e-3, "logging_steps": 1}
        )
        context = make_context()
        train_qlora(base_model=base_model, dataset=dataset, output_dir=tmp_path / optim, config=config, context=context)
        return tuple(point["train/loss"] for _, point in recorded(context).points if "train/loss" in point)

    found = {optim: losses(optim) for optim in OPTIMIZERS}
    for optim, curve in found.items():
        assert curve[-1] < curve[0], optim
    kinds = {"adamw_torch", "adamw_8bit", "adafactor", "lion_32bit"}
    assert len({found[optim] for optim in kinds}) == len(kinds)
    assert found["paged_adamw_8bit"] == found["adamw_8bit"] == found["adamw_bnb_8bit"]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0, 0.5, 1, 1, 1, 1]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 2}, [0, 0.5, 1, 0.8536, 0.5, 0.1464]),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_num_cycles": 3, "warmup_steps": 0},
            [1, 0.5, 1, 0.5, 1, 0.5],
        ),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    schedule: dict[str, Any],
    shares: list[float],
    make_context: MakeContext,
    base_model: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    config = TrainQLoRAConfig(**CONFIG.model_dump() | {"logging_steps": 1} | schedule)
    context = make_context()
    train_qlora(base_model=base_model, dataset=dataset, output_dir=tmp_path / "a", config=config, context=context)
    rates = [point["train/learning_rate"] for _, point in recorded(context).points if "train/learning_rate" in point]
    assert rates == pytest.approx([share * CONFIG.learning_rate for share in shares], rel=1e-3)


def test_rows_that_the_base_has_no_positions_for_are_refused_before_it_is_loaded(
    make_context: MakeContext, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemill.training.kernels.load_base", lambda *_: pytest.fail("loaded"))
    ids = [5] * 1100
    write_rows(split_path(tmp_path, "train"), LabelledRow, [LabelledRow(input_ids=ids, labels=ids)])
    with pytest.raises(UserError, match=r"a row has 1100 tokens, and the base model has positions for 1024"):
        train_qlora(
            base_model=base_model, dataset=tmp_path, output_dir=tmp_path / "a", config=CONFIG, context=make_context()
        )
