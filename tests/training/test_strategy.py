"""How a training is shared: what is chosen, refused, and kept when there are fewer processes."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.training.checkpoint import check_optimizer, global_batch, keep_global_batch
from finemill.training.memory import GIB, needed_gib
from finemill.training.strategy import check_strategy, settle_strategy, strategy_arguments

BASE = BUILTIN_MODELS["builtin:tiny-qwen3"]


def test_auto_takes_copies_where_one_fits_and_shards_where_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainQLoRAConfig(method="full")
    needed = needed_gib(json.loads((BASE / "config.json").read_text()), config) * GIB
    chosen = [settle_strategy(config, BASE, limit) for limit in (None, needed, 0.9 * needed, 0.1 * needed)]
    assert [(one.strategy, one.offload) for one in chosen] == [
        ("ddp", False),
        ("ddp", False),
        ("fsdp2", False),
        ("fsdp2", True),
    ]


@pytest.mark.parametrize("values", [{"method": "full"}, {"method": "full", "strategy": "fsdp2"}, {"kernels": "off"}])
def test_layers_are_computed_again_where_a_card_would_not_hold_them(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainQLoRAConfig(per_device_train_batch_size=8, **values)
    needed = needed_gib(json.loads((BASE / "config.json").read_text()), config) * GIB
    recompute = [settle_strategy(config, BASE, limit).gradient_checkpointing for limit in (needed, 10 * needed)]
    assert recompute == [True, False]


@pytest.mark.parametrize(("rows", "strategy", "again"), [(2, "auto", False), (64, "auto", True), (2, "fsdp2", True)])
def test_layers_are_computed_once_on_a_cpu_where_little_memory_holds_them(
    rows: int, strategy: Literal["auto", "fsdp2"], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainQLoRAConfig(per_device_train_batch_size=rows, strategy=strategy)
    assert settle_strategy(config, BASE, None).gradient_checkpointing is again


def test_layers_are_gathered_once_per_pass_where_a_card_holds_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    gathered_again = [
        strategy_arguments(settle_strategy(config, BASE, limit))["fsdp_config"]["reshard_after_forward"]
        for config in (TrainQLoRAConfig(strategy="fsdp2"), TrainQLoRAConfig(strategy="fsdp2", offload=True))
        for limit in (1e8, 1e12)
    ]
    assert gathered_again == [True, False, True, True]


@pytest.mark.parametrize(("shape", "policy"), [("qwen3-1.7b", "NO_WRAP"), ("qwen3-8b", None)])
def test_a_small_model_is_gathered_in_one_piece(
    shape: str, policy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape].config()))
    config = settle_strategy(TrainQLoRAConfig(strategy="fsdp2", method="full"), tmp_path, 1e12)
    assert strategy_arguments(config)["fsdp_config"].get("auto_wrap_policy") == policy


@pytest.mark.parametrize("asked", [True, False])
def test_recomputation_that_is_asked_for_stays(asked: bool) -> None:
    config = TrainQLoRAConfig(kernels="off", gradient_checkpointing=asked)
    assert settle_strategy(config, BASE, 1e12).gradient_checkpointing is asked


def test_gradients_are_whole_between_passes_only_where_memory_is_no_matter() -> None:
    each = [
        strategy_arguments(TrainQLoRAConfig(strategy="fsdp2", gradient_checkpointing=saved))["accelerator_config"]
        for saved in (True, False)
    ]
    assert [found["gradient_accumulation_kwargs"]["sync_each_batch"] for found in each] == [True, False]


def test_auto_divides_a_4_bit_base_where_copies_would_come_from_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("finemill.training.strategy._readable_gpus", lambda: 2)
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-32b"].config()))
    config = TrainQLoRAConfig(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    chosen = [settle_strategy(config, tmp_path, limit * GIB).strategy for limit in (80, 18)]
    assert chosen == ["ddp", "shard"]
    unreadable = config.model_copy(update={"strategy": "shard"})
    assert settle_strategy(unreadable, tmp_path, 18 * GIB).strategy == "shard"
    with pytest.raises(UserError, match=r"no plan fits 7\.88 GiB: the leanest needs"):
        settle_strategy(unreadable, tmp_path, 8 * GIB)
    monkeypatch.setattr("finemill.training.strategy._readable_gpus", lambda: 1)
    assert settle_strategy(config, tmp_path, 18 * GIB).strategy == "ddp"
    with pytest.raises(UserError, match="no GPUs that can read each other's memory; use strategy 'ddp' or 'fsdp2'"):
        settle_strategy(unreadable, tmp_path, 18 * GIB)
    with pytest.raises(UserError, match="strategy 'shard' cannot run here: there is no GPU"):
        settle_strategy(unreadable, tmp_path, None)


def test_one_process_has_nothing_to_share(caplog: pytest.LogCaptureFixture) -> None:
    config = TrainQLoRAConfig(strategy="fsdp2", offload=True)
    assert settle_strategy(config, BASE, None).strategy == "ddp"
    assert "strategy 'fsdp2' has nothing to share in one process" in caplog.text
    assert not settle_strategy(TrainQLoRAConfig(offload=True), BASE, None).offload
    assert "offload has nothing to share in one process" in caplog.text


@pytest.mark.parametrize(("processes", "size", "passes"), [("1", 4, 6), ("3", 4, 2), ("4", 3, 2), ("8", 3, 1)])
def test_fewer_processes_or_more_keep_the_rows_of_a_step(
    processes: str, size: int, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "global_batch.json").write_text("24")
    monkeypatch.setenv("WORLD_SIZE", processes)
    config = TrainQLoRAConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    kept = keep_global_batch(config, tmp_path)
    assert (kept.per_device_train_batch_size, kept.gradient_accumulation_steps) == (size, passes)
    assert global_batch(kept) == 24


def test_processes_that_cannot_share_the_rows_of_a_step_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "global_batch.json").write_text("24")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="24 rows per step, which 5 processes cannot share"):
        keep_global_batch(TrainQLoRAConfig(), tmp_path)


def test_a_loss_that_compares_the_rows_of_a_pass_keeps_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "global_batch.json").write_text("24")
    config = TrainDPOConfig(loss_type="kto", per_device_train_batch_size=4, gradient_accumulation_steps=3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert keep_global_batch(config, tmp_path).per_device_train_batch_size == 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes cannot share evenly in passes of 4, whose rows the loss compares"):
        keep_global_batch(config, tmp_path)


@pytest.mark.parametrize("flat", [True, False])
def test_a_checkpoint_of_the_kernels_is_theirs_and_no_other_is(flat: bool, tmp_path: Path) -> None:
    moments = {"exp_avg": torch.zeros(2, dtype=torch.uint8)}
    torch.save({"moments" if flat else "state": moments}, tmp_path / "optimizer.pt")
    assert check_optimizer(tmp_path, flat=flat) is (True if flat else None)
    with pytest.raises(UserError, match="was written on finemill's kernels" if flat else "on transformers' layers"):
        check_optimizer(tmp_path, flat=not flat)


def test_deepspeed_that_is_not_installed_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemill.training.strategy.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'finemill\[deepspeed\]'"):
        check_strategy(TrainQLoRAConfig(strategy="zero3"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "fsdp2", "load_in_8bit": True}, "LLM.int8 keeps a weight in one piece"),
        ({"strategy": "zero3", "use_dora": True}, "use_dora needs the norms of whole weights"),
        ({"strategy": "zero2", "optim": "lion_8bit"}, "optim must be AdamW"),
        ({"strategy": "shard", "kernels": "off"}, "kernels are 'off': use strategy 'fsdp2'"),
        ({"strategy": "shard", "load_in_4bit": False}, "the base has 16 bits: use strategy 'fsdp2'"),
        ({"strategy": "fsdp2", "kernels": "on"}, "kernels 'on' train no shards"),
        ({"strategy": "ddp", "offload": True}, "offload True has no effect with strategy 'ddp'"),
        ({"strategy_config": {"a": 1}}, "has no effect with strategy 'auto'"),
        ({"strategy": "zero3", "strategy_config": "nowhere.json"}, "strategy_config nowhere.json: No such file"),
    ],
)
def test_a_combination_that_cannot_run_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_config(TrainQLoRAConfig, values, "train-qlora")
    assert "\n" not in str(error.value)


def test_settings_of_the_users_own_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    config = TrainQLoRAConfig(strategy="zero3", strategy_config=str(file))
    assert config.strategy_config == {"zero_optimization": {"stage": 3}}
