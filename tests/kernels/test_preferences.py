"""Preference trainers on the engine log what TRL's log, step by step, and end with the same adapters."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finemill.kernels.engine.optimizer import FlatAdamW
from finemill.kernels.preferences import FastDPOTrainer, FastKTOTrainer
from tests.kernels.test_accelerate import ATTENTION_AND_EXPERTS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with transformers in float32 on a CPU"),
]
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t1")),
    pad_token="t0",
    eos_token="t2",
    unk_token="t1",
)


def rows(unpaired: bool, number: int = 12) -> Dataset:
    """Prompts of 2 to 6 tokens, answers of 3 to 20."""
    torch.manual_seed(1)

    def draw(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, ()))
        return torch.randint(3, 64, (size,)).tolist()

    if not unpaired:
        names = {"prompt_ids": (2, 7), "chosen_ids": (3, 21), "rejected_ids": (3, 21)}
        return Dataset.from_list([{name: draw(*sizes) for name, sizes in names.items()} for _ in range(number)])
    answers = [draw(3, 21) for _ in range(number)]
    return Dataset.from_list(
        [
            {"prompt_ids": draw(2, 7), "completion_ids": own, "KL_completion_ids": answers[i - 1], "label": i % 3 == 0}
            for i, own in enumerate(answers)
        ]
    )


def train(
    trainer_class: Any, folder: Path, lora: dict[str, Any] | None = None, experts: bool = False, **settings: Any
) -> Any:
    """A tiny Qwen3, or one with experts, its adapters not at the reference but away from it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config: PretrainedConfig = Qwen3Config(**sizes, **heads)
    if experts:
        mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        config, lora = Qwen3MoeConfig(**sizes, **heads, **mixture), ATTENTION_AND_EXPERTS
    unpaired = issubclass(trainer_class, KTOTrainer)
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 32,
        "max_grad_norm": 0.2,
        "disable_tqdm": True,
    }
    trainer = type("Tokenized", (trainer_class,), {"_prepare_dataset": lambda self, dataset, *_: dataset})(
        model=AutoModelForCausalLM.from_config(config),
        args=(KTOConfig if unpaired else DPOConfig)(output_dir=str(folder), **(defaults | settings)),
        train_dataset=rows(unpaired),
        eval_dataset=rows(unpaired, 4),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **(lora or {})}),
    )
    trainer.train()
    return trainer


def history(trainer: Any, *unlike: str) -> list[dict[str, float]]:
    timed = ("runtime", "per_second", "flos", *unlike)
    return [
        {name: float(value) for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]


def adapters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("plain", "fast", "settings"),
    [
        (DPOTrainer, FastDPOTrainer, {}),
        (DPOTrainer, FastDPOTrainer, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.3]}),
        (DPOTrainer, FastDPOTrainer, {"loss_type": ["aot"], "lr_scheduler_type": "cosine", "weight_decay": 0.1}),
        (DPOTrainer, FastDPOTrainer, {"precompute_ref_log_probs": True}),
        (DPOTrainer, FastDPOTrainer, {"optim": "adafactor", "ld_alpha": 0.5}),
        (DPOTrainer, FastDPOTrainer, {"eval_strategy": "steps", "eval_steps": 2}),
        (DPOTrainer, FastDPOTrainer, {"experts": True, "router_aux_loss_coef": 0.0}),
        (KTOTrainer, FastKTOTrainer, {}),
        (KTOTrainer, FastKTOTrainer, {"experts": True, "router_aux_loss_coef": 0.0}),
        (KTOTrainer, FastKTOTrainer, {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_every_logged_number_and_the_adapters_equal_trls(
    plain: Any, fast: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    expected, got = train(plain, tmp_path, **settings), train(fast, tmp_path, **settings)
    assert got.fast, got.acceleration.reason
    assert len(history(got)) >= 4
    for ours, theirs in zip(history(got), history(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    wanted = adapters(expected)
    for name, value in adapters(got).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize(("plain", "fast"), [(DPOTrainer, FastDPOTrainer)])
def test_float16_with_a_scaled_loss_trains_as_float32(
    plain: Any, fast: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(plain, tmp_path)
    from_config, begin = AutoModelForCausalLM.from_config, fast.train

    def begin_scaled(self: Any) -> Any:
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return begin(self)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda config: from_config(config, dtype=torch.float16))
    monkeypatch.setattr(fast, "train", begin_scaled)
    got = train(fast, tmp_path)
    assert got.fast, got.acceleration.reason
    for ours, theirs in zip(history(got), history(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=0.05, abs=0.05)


def test_adamw_is_the_flat_one(tmp_path: Path) -> None:
    assert isinstance(train(FastDPOTrainer, tmp_path, max_steps=1)._flat_optimizer, FlatAdamW)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "lora": {"lora_dropout": 0.2},
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    settings |= {"disable_dropout": False}
    whole = train(FastDPOTrainer, tmp_path, **settings)
    steps, run = count(), FastDPOTrainer.train
    monkeypatch.setattr(
        FastDPOTrainer, "train", lambda self: run(self, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    )
    forward = FastDPOTrainer.training_step
    monkeypatch.setattr(FastDPOTrainer, "training_step", lambda *args, **kw: (next(steps), forward(*args, **kw))[1])
    resumed = train(FastDPOTrainer, tmp_path, **settings)
    assert next(steps) == 4
    expected = adapters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in adapters(resumed).items())


def test_what_the_engine_does_not_cover_trains_as_trl_does(tmp_path: Path) -> None:
    expected = train(DPOTrainer, tmp_path, use_weighting=True)
    got = train(FastDPOTrainer, tmp_path, use_weighting=True)
    assert not got.fast
    assert "use_weighting" in got.acceleration.reason
    assert history(got) == history(expected)
