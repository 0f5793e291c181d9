"""Processes that share a row train what one process trains on it, over gloo on a CPU."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import group
from torch.nn import functional

from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.context_parallel import CutRows, attend, check_context_parallel
from finemill.components.train_qlora.step import run as train_qlora
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.runtime.context import Unheard
from finemill.training.memory import estimate_memory, not_on_kernels
from tests.contexts import training_context
from tests.two_processes import free_port, run_in_two

SETTINGS: dict[str, Any] = {
    "lora_r": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0.0,
    "logging_steps": 1,
    "save_steps": None,
}
BASE = BUILTIN_MODELS["builtin:tiny-qwen3"]


def join_two(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def train(base_model: Path, dataset: Path, folder: Path, output: str, **values: Any) -> None:
    config = TrainQLoRAConfig(**SETTINGS | values)
    context = training_context(folder.as_uri(), Unheard())
    train_qlora(base_model=base_model, dataset=dataset, output_dir=folder / output, config=config, context=context)


def train_cut(rank: int, port: int, base_model: Path, dataset: Path, folder: Path) -> None:
    join_two(rank, port)
    train(base_model, dataset, folder, f"cut-{rank}", context_parallel=2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs over gloo on a CPU")
def test_cut_rows_train_what_whole_rows_train(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    run_in_two(train_cut, free_port(), base_model, dataset, tmp_path)
    train(base_model, dataset, tmp_path, "whole")
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for output in ("cut-0", "cut-1"):
        found = load_file(tmp_path / output / "adapter_model.safetensors")
        for weight, values in expected.items():
            torch.testing.assert_close(found[weight], values, rtol=0, atol=1e-5, msg=f"{output} {weight}")
    whole, cut = (
        json.loads((tmp_path / name / "training.json").read_text())["log_history"][:2] for name in ("whole", "cut-0")
    )
    for name in ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy", "epoch"):
        assert [point[name] for point in cut] == pytest.approx([point[name] for point in whole], rel=1e-4), name


def attend_cut(rank: int, port: int) -> None:
    join_two(rank, port)
    torch.distributed.init_process_group("gloo")
    assert group.WORLD is not None
    for heads in (1, 2):
        parts, whole = _heads(heads), _heads(heads)
        own = slice(rank * 4, rank * 4 + 4)
        query, key, value = (part[:, :, own] for part in parts)
        output, _ = attend(nn.Module(), query, key, value, None, group=group.WORLD)
        query, key, value = whole
        expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        expected = expected.transpose(1, 2)
        torch.testing.assert_close(output, expected[:, own])
        output.square().sum().backward()
        expected.square().sum().backward()
        for part, tensor in zip(parts, whole, strict=True):
            assert part.grad is not None
            assert tensor.grad is not None
            torch.testing.assert_close(part.grad[:, :, own], tensor.grad[:, :, own])
    torch.distributed.destroy_process_group()


def _heads(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 8, 16), (2, count, 8, 16), (2, count, 8, 16))
    return [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]


def test_attention_and_its_gradients_equal_those_of_whole_rows() -> None:
    run_in_two(attend_cut, free_port())


def test_the_label_behind_a_cut_is_the_next_part_s_first_token() -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}, {"input_ids": [4], "labels": [4]}]
    left, right = (CutRows(2, part)(rows) for part in (0, 1))
    assert [left["shift_labels"].tolist(), right["shift_labels"].tolist()] == [
        [[-100, 7, 8], [-100, -100, -100]],
        [[9, -100, -100], [-100, -100, -100]],
    ]
    assert [left["input_ids"].tolist(), right["input_ids"].tolist()] == [[[5, 6, 7], [4, 0, 0]], [[8, 9, 0], [0, 0, 0]]]
    assert right["position_ids"].tolist() == [[3, 4, 5]] * 2
    assert right["attention_mask"].tolist() == [[1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packing": True}, "leave packing out"),
        ({"eval_steps": 5}, "leave eval_steps out"),
        ({"neftune_noise_alpha": 5.0}, "leave neftune_noise_alpha out"),
        ({"kernels": "on"}, "kernels 'on' train whole rows"),
        ({"strategy": "zero3"}, "strategy 'zero3' trains whole rows"),
    ],
)
def test_what_needs_whole_rows_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"context_parallel 2 cuts rows among GPUs, and .*{message}"):
        parse_config(TrainQLoRAConfig, values | {"context_parallel": 2}, where="here")


@pytest.mark.parametrize(
    ("processes", "changed", "message"),
    [
        (1, {}, "among 2 processes of a host, and there are 1"),
        (2, {"num_attention_heads": 3}, "cannot share 3 attention heads"),
        (2, {"sliding_window": 64, "use_sliding_window": True}, "the base has sliding_attention"),
    ],
)
def test_what_the_machine_or_the_base_does_not_allow_is_refused(
    processes: int, changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    model = json.loads((BASE / "config.json").read_text()) | {"layer_types": None} | changed
    (tmp_path / "config.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match=message):
        check_context_parallel(tmp_path, TrainQLoRAConfig(context_parallel=2))


def test_a_card_holds_its_part_of_the_tokens_on_the_plain_path() -> None:
    model = json.loads((BASE / "config.json").read_text())
    whole, half = (estimate_memory(model, TrainQLoRAConfig(context_parallel=count)) for count in (1, 2))
    assert half.activations == pytest.approx(whole.activations / 2)
    assert not_on_kernels(TrainQLoRAConfig(context_parallel=2)) == "context_parallel is 2"
