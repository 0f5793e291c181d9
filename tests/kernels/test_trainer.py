"""FastSFTTrainer logs what SFTTrainer logs, step by step, on packed, padded and accumulated batches."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

from finemill.kernels.accelerate import restore_model
from finemill.kernels.engine.loss_head import HeadResult
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.optimizer import FlatAdamW
from finemill.kernels.engine.shapes import Buckets, Shapes
from finemill.kernels.ops.packing import PackedBatch
from finemill.kernels.trainer import FastSFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with transformers in float32 on a CPU"),
]


def make_trainer(
    trainer_class: type[SFTTrainer],
    tmp_path: Path,
    *,
    lora: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
    rows: int = 24,
    mixture: dict[str, Any] | None = None,
    model: Any = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """A tiny Qwen3 on rows of 5 to 29 tokens; `given` are arguments of the trainer, `settings` of SFTConfig.

    With `mixture` it has experts, and that of its configuration; `model` is in its place.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = Qwen3Config(**sizes) if mixture is None else Qwen3MoeConfig(**sizes, **experts, **mixture)
    if mixture is not None:
        # PEFT's all-linear counts routers among linear layers.
        lora = {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
    vocabulary = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="t0", eos_token="t2", unk_token="t1")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 30, (rows,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    data = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 2 + row[2:] for row in ids]})
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 32,
        "dataset_kwargs": {"skip_prepare_dataset": not settings.get("packing")},
        "max_grad_norm": 0.2,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    if model is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return trainer_class(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), **(defaults | settings)),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        peft_config=LoraConfig(**{"r": 4, "target_modules": "all-linear", **(lora or {})}),
        **(given or {}),
    )


def history(trainer: Any, *names: str) -> torch.Tensor:
    names = names or ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy")
    return torch.tensor(
        [[float(entry[name]) for name in names] for entry in trainer.state.log_history if names[0] in entry]
    )


def train(trainer_class: type[SFTTrainer], tmp_path: Path, **settings: Any) -> tuple[torch.Tensor, Any]:
    trainer = make_trainer(trainer_class, tmp_path, **settings)
    trainer.train()
    return history(trainer), trainer


def adapters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("packing", "accumulation"), [(False, 2), (True, 1)])
def test_every_logged_number_equals_trls(packing: bool, accumulation: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"packing": packing, "gradient_accumulation_steps": accumulation}
    expected, _ = train(SFTTrainer, tmp_path, **settings)
    got, trainer = train(FastSFTTrainer, tmp_path, **settings)
    assert trainer.fast
    assert expected.shape == (4, 5)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_mixture_of_experts_logs_what_trl_does_over_50_steps(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mixture": {}, "max_steps": 50, "router_aux_loss_coef": 0.0}
    expected, _ = train(SFTTrainer, tmp_path, **settings)
    got, trainer = train(FastSFTTrainer, tmp_path, **settings)
    assert trainer.fast, trainer.acceleration.reason
    assert expected.shape == (50, 5)
    assert expected[-1, 0] < expected[0, 0] - 0.1
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("mixture", "settings", "reason"),
    [
        ({}, {}, "router's auxiliary loss is not covered"),
        ({"mlp_only_layers": [0]}, {"router_aux_loss_coef": 0.0}, "only some layers have experts"),
    ],
)
def test_a_mixture_that_no_plan_covers_trains_as_in_trl(
    mixture: dict[str, Any], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    trainer = make_trainer(FastSFTTrainer, tmp_path, mixture=mixture, **settings)
    assert not trainer.fast
    assert reason in trainer.acceleration.reason


@pytest.mark.parametrize("packing", [False, True])
def test_how_long_sequences_are_is_read_from_the_data(packing: bool, tmp_path: Path) -> None:
    trainer = make_trainer(FastSFTTrainer, tmp_path, packing=packing)
    lengths = [len(row) for row in make_trainer(FastSFTTrainer, tmp_path, packing=False).train_dataset["input_ids"]]
    assert trainer._typical_length() == sum(n**2 for n in lengths) // sum(lengths) < max(lengths)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    assert trainer._typical_length() is None


def test_optimizer_state_survives_saving(tmp_path: Path) -> None:
    _, trainer = train(FastSFTTrainer, tmp_path)
    state = trainer.optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    trainer.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    moments = trainer.optimizer.state_dict()["moments"]
    assert all(torch.equal(moments[name], tensor) for name, tensor in state["moments"].items())


def stochastic_descent(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "settings",
    [
        # Twelve micro-batches of two rows in steps of five: the last step of an epoch has two.
        {"gradient_accumulation_steps": 5, "max_steps": 7},
        {"rows": 23, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1.0},
        {"weight_decay": 0.3},
        {"optim": "sgd", "learning_rate": 0.1},
        {"optim": "adafactor", "gradient_accumulation_steps": 2},
        {"optim": "lion_32bit", "learning_rate": 1e-4},
        {"optim": "adamw_8bit", "max_steps": 2},
        {"lr_scheduler_type": "cosine", "logging_steps": 3, "max_steps": 6},
        {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2},
        {"padding_free": True, "max_length": None},
        {"pad_to_multiple_of": 16},
        {"lora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}},
    ],
    ids=str,
)
def test_training_equals_trls_with(settings: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = train(SFTTrainer, tmp_path, **settings)
    _, ours = train(FastSFTTrainer, tmp_path, **settings)
    assert ours.fast
    names = ("loss", "grad_norm", "learning_rate", "num_tokens")
    torch.testing.assert_close(history(ours, *names), history(theirs, *names), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(history(ours, "eval_loss"), history(theirs, "eval_loss"), rtol=1e-4, atol=1e-5)
    expected = adapters(theirs)
    for name, value in adapters(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("optim", "eight_bit", "bits"),
    [
        ("adamw_torch", None, 32),
        ("adamw_torch", True, 8),
        ("adamw_torch_fused", False, 32),
        ("adamw_8bit", False, 8),
        ("paged_adamw_8bit", None, None),
        ("lion_8bit", True, None),
    ],
)
def test_the_optimizer_is_the_one_that_is_named(
    optim: str, eight_bit: bool | None, bits: int | None, tmp_path: Path
) -> None:
    trainer = make_trainer(FastSFTTrainer, tmp_path, optim=optim, given={"eight_bit": eight_bit})
    optimizer = trainer.create_optimizer()
    if bits is None:
        assert type(optimizer).__module__.startswith("bitsandbytes")
    else:
        assert isinstance(optimizer, FlatAdamW)
        assert {tensor.dtype for tensor in optimizer.moments.tensors().values()} >= {
            8: {torch.uint8},
            32: {torch.float32},
        }[bits]


def test_the_callers_own_optimizer_steps(tmp_path: Path) -> None:
    runs = []
    for trainer_class in (SFTTrainer, FastSFTTrainer):
        trainer = make_trainer(trainer_class, tmp_path)
        trainer.optimizer = stochastic_descent([p for p in trainer.model.parameters() if p.requires_grad])
        trainer.train()
        runs.append(history(trainer))
    assert trainer.fast
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)


class TwiceTheLoss:
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)  # type: ignore[misc]


class OwnLoss(TwiceTheLoss, FastSFTTrainer):
    pass


class OwnStockLoss(TwiceTheLoss, SFTTrainer):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    ("reason", "trainer_class", "settings"),
    [
        ("loss_type is 'dft'", FastSFTTrainer, {"loss_type": "dft"}),
        ("label_smoothing_factor is 0.1", FastSFTTrainer, {"label_smoothing_factor": 0.1}),
        ("neftune_noise_alpha is 5", FastSFTTrainer, {"neftune_noise_alpha": 5}),
        ("compute_loss_func", FastSFTTrainer, {"given": {"compute_loss_func": lambda out, labels, **_: out[0].mean()}}),
        ("compute_loss is overridden", OwnLoss, {}),
    ],
)
def test_arguments_that_change_the_loss_train_as_trl_does(
    reason: str, trainer_class: type[SFTTrainer], settings: dict[str, Any], tmp_path: Path
) -> None:
    expected, _ = train(OwnStockLoss if trainer_class is OwnLoss else SFTTrainer, tmp_path, max_steps=2, **settings)
    got, trainer = train(trainer_class, tmp_path, max_steps=2, **settings)
    assert not trainer.fast
    assert reason in trainer.acceleration.reason
    assert torch.equal(got, expected)


def test_a_batch_with_unknown_columns_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(FastSFTTrainer, tmp_path)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate(rows) | {"shift_labels": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="shift_labels"):
        trainer.train()


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}], ids=["plain", "dropout"])
def test_a_resumed_training_is_the_uninterrupted_one(lora: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "lora": lora,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    whole, resumed = (make_trainer(FastSFTTrainer, tmp_path / name, **settings) for name in ("whole", "resumed"))
    for trainer in (whole, resumed):  # as on a GPU
        trainer._shapes = Shapes(Buckets(64, 64))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.fast
    assert resumed._shapes.state() == whole._shapes.state()
    assert resumed.state.global_step == 6
    expected = adapters(whole)
    for name, value in adapters(resumed).items():
        assert torch.equal(value, expected[name]), name


def fail_at(monkeypatch: pytest.MonkeyPatch, passes: set[int]) -> None:
    """Run out of memory in the passes of these numbers, after the gradient has changed."""
    count = itertools.count()
    run = FastModel.loss_and_grad

    def short_of_memory(self: FastModel, batch: PackedBatch, scale: torch.Tensor | float) -> HeadResult:
        result = run(self, batch, scale)
        if next(count) in passes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(FastModel, "loss_and_grad", short_of_memory)


def with_micro_batches(trainer: FastSFTTrainer, tokens: int) -> FastSFTTrainer:
    trainer._adopt(replace(trainer._plan, micro_batch=tokens, peak=1 << 40), None)
    return trainer


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 3}
    calm = with_micro_batches(make_trainer(FastSFTTrainer, tmp_path, **settings), 256)
    calm.train()
    # In the second step's only pass, then in a pass behind the first one.
    fail_at(monkeypatch, {1, 4})
    pressed = with_micro_batches(make_trainer(FastSFTTrainer, tmp_path, **settings), 256)
    pressed.train()
    assert pressed._plan.micro_batch == 64
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()] == [
        "out of memory: micro-batches of 128 tokens instead of 256 from here on",
        "out of memory: micro-batches of 64 tokens instead of 128 from here on",
    ]
    torch.testing.assert_close(history(pressed), history(calm), rtol=1e-4, atol=1e-5)


def test_a_row_that_does_not_fit_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, set(range(9)))
    trainer = with_micro_batches(make_trainer(FastSFTTrainer, tmp_path), 64)
    with pytest.raises(torch.OutOfMemoryError, match="micro-batches of 32 tokens, and a row may have 32"):
        trainer.train()


def test_dropout_follows_the_seed(tmp_path: Path) -> None:
    lora = {"lora_dropout": 0.2}
    first, again, other = (train(FastSFTTrainer, tmp_path, lora=lora, seed=seed, data_seed=1)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_saved_adapter_is_the_trained_one(tmp_path: Path) -> None:
    _, trainer = train(FastSFTTrainer, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): value for name, value in adapters(trainer).items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    logits = trainer.model(torch.tensor([[3, 4, 5]])).logits
    restore_model(trainer.model)
    torch.testing.assert_close(trainer.model(torch.tensor([[3, 4, 5]])).logits, logits)
    assert trainer.evaluate()["eval_loss"] > 0


def test_training_leaves_an_embedding_in_host_memory_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = []
    prepare = Accelerator.prepare_model

    def spy(self: Accelerator, model: Any, device_placement: bool | None = None, **kwargs: Any) -> Any:
        placed.append(device_placement)
        return prepare(self, model, device_placement=device_placement, **kwargs)

    monkeypatch.setattr(Accelerator, "prepare_model", spy)
    make_trainer(FastSFTTrainer, tmp_path, max_steps=1).train()
    assert placed == [False]


def test_operations_are_counted_as_sft_trainer_does(tmp_path: Path) -> None:
    trainer = make_trainer(FastSFTTrainer, tmp_path)
    inputs = {"input_ids": torch.ones((2, 3), dtype=torch.long)}
    for _ in range(2):
        assert trainer.floating_point_ops(inputs) == SFTTrainer.floating_point_ops(trainer, inputs) > 0


def half_trainer(tmp_path: Path, scaler: torch.amp.GradScaler, **settings: Any) -> Any:
    """A trainer in float16 with a scaler of the loss, which transformers makes on a GPU only."""
    trainer = make_trainer(FastSFTTrainer, tmp_path, dtype=torch.float16, **settings)
    trainer.accelerator.scaler = scaler
    return trainer


@pytest.mark.parametrize("settings", [{}, {"mixture": {}, "router_aux_loss_coef": 0.0}], ids=["dense", "mixture"])
def test_float16_with_a_scaled_loss_trains_as_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    expected, _ = train(FastSFTTrainer, tmp_path, **settings)
    # Unscaled, gradients of a loss divided by as much are zero in float16.
    trainer = half_trainer(tmp_path, torch.amp.GradScaler("cpu", init_scale=2.0**16), **settings)
    assert trainer.fast, trainer.acceleration.reason
    trainer.train()
    torch.testing.assert_close(history(trainer), expected, rtol=2e-2, atol=2e-3)


def test_a_step_that_overflows_in_float16_is_left_out(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    trainer = half_trainer(tmp_path, scaler, max_steps=3)
    trainer.train()
    assert not history(trainer)[0].isfinite().all()
    assert history(trainer)[1:].isfinite().all()
    assert scaler.get_scale() == 2.0**10
    assert trainer._flat_optimizer.count == 2
    assert trainer._engine.adapters.master.isfinite().all()
