"""`finemill estimate` answers from a configuration alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.dataset import read_lengths
from finemill.commands.estimate import METHODS, execute
from finemill.components.chat_format.packing import num_packs
from finemill.errors import UserError
from finemill.kernels.bench.data import _config
from finemill.kernels.planning.model_shapes import MIXTURES, SHAPES
from finemill.kernels.planning.planner import NoPlanError

Capture = pytest.CaptureFixture[str]


def estimate(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert execute("estimate", [*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def folder_of(tmp_path: Path, config: dict[str, Any], tiny_model_dir: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((tiny_model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")
    return str(tmp_path)


def test_a_folder_and_the_name_of_its_shape_give_the_same_estimate(
    tmp_path: Path, tiny_model_dir: Path, capsys: Capture
) -> None:
    folder = folder_of(tmp_path, _config(SHAPES["qwen3-0.6b"]), tiny_model_dir)
    by_name = estimate(capsys, "--model", "qwen3-0.6b", "--memory-gb", "8")
    assert by_name == estimate(capsys, "--model", folder, "--memory-gb", "8")
    assert by_name["peak_gb"] <= 8


def test_any_reference_of_a_base_is_estimated(capsys: Capture) -> None:
    assert estimate(capsys, "--model", "builtin:tiny-qwen3")["peak_gb"] < 1


def test_a_higher_rank_takes_more_memory(capsys: Capture) -> None:
    small, large = (estimate(capsys, "--model", "qwen3-8b", "--rank", rank) for rank in ("16", "128"))
    assert large["static_gb"] > small["static_gb"]


def test_cards_divide_a_base_that_none_can_hold_and_copy_one_that_fits(capsys: Capture) -> None:
    step = ("--seq", "2048", "--bs", "1", "--accum", "1", "--gpus", "2")
    alone = estimate(capsys, "--model", "qwen3-32b", "--memory-gb", "17", *step[:-1], "1")
    divided = estimate(capsys, "--model", "qwen3-32b", "--memory-gb", "17", *step)
    assert (divided["strategy"], divided["weights_streamed"], alone["weights_streamed"]) == ("shard", False, True)
    assert divided["tokens_per_s"] > 2 * alone["tokens_per_s"]
    assert max(alone["peak_gb"], divided["peak_gb"]) <= 17
    assert estimate(capsys, "--model", "qwen3-8b", *step)["strategy"] == "ddp"


def test_little_host_memory_makes_a_slower_plan(capsys: Capture) -> None:
    step = ("--model", "qwen3-8b", "--seq", "32768", "--bs", "1", "--accum", "1", "--card-gb", "24")
    free, bound = estimate(capsys, *step), estimate(capsys, *step, "--host-gb", "12")
    assert bound["host_gb"] <= 12 < free["host_gb"]
    assert bound["tokens_per_s"] < free["tokens_per_s"]


def test_a_card_of_slower_memory_takes_longer(capsys: Capture) -> None:
    h100, h200 = (estimate(capsys, "--model", "qwen3-8b", "--gpu", gpu) for gpu in ("h100", "h200"))
    assert h100["step_s"] > h200["step_s"]
    assert h200 == estimate(capsys, "--model", "qwen3-8b", "--memory-gb", "80")
    assert h200 != estimate(capsys, "--model", "qwen3-8b", "--card-gb", "24")


def test_a_mixture_of_experts_is_estimated_and_one_with_dense_layers_has_no_speed(
    tmp_path: Path, tiny_model_dir: Path, capsys: Capture
) -> None:
    settings = ("--model", "qwen3-30b-a3b", "--bs", "8", "--accum", "1", "--memory-gb")
    small, large = (estimate(capsys, *settings, memory) for memory in ("17.5", "140"))
    assert small["peak_gb"] <= 17.5
    assert 10_000 < small["tokens_per_s"] < large["tokens_per_s"]
    assert small["weights_streamed"]
    assert not large["weights_streamed"]
    folder = folder_of(tmp_path, MIXTURES["qwen3-30b-a3b"] | {"mlp_only_layers": [0]}, tiny_model_dir)
    with pytest.raises(UserError, match=r"has layers without experts: .* mixtral, qwen3_moe, with equal"):
        execute("estimate", ["--model", folder, "--dataset", "any"])


def test_the_plain_listing_names_every_number(capsys: Capture) -> None:
    assert execute("estimate", ["--model", "llama3-8b"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"peak_gb", "tokens_per_s", "step_s"}


def test_the_table_says_what_fits_a_card(capsys: Capture) -> None:
    needed = estimate(capsys, "--table")
    assert needed["qwen3-8b"]["QLoRA"] < 3.4 < needed["qwen3-8b"]["QLoRA, plain"]
    assert all(row[method] > row["QLoRA"] for row in needed.values() for method in METHODS if method != "QLoRA")
    assert execute("estimate", ["--table", "--card-gb", "24"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("GiB, card of 24")
    assert len(rows) == len(needed)
    (row,) = [row for row in rows if row.startswith("qwen3-32b")]
    assert "(" in row
    assert not row.split()[1].startswith("(")


def test_a_family_without_kernels_has_the_memory_of_transformers_layers(
    tmp_path: Path, tiny_model_dir: Path, capsys: Capture
) -> None:
    folder = folder_of(tmp_path, {"model_type": "gpt2"}, tiny_model_dir)
    needed = estimate(capsys, "--model", folder)[folder]
    assert set(needed) == {name for name in METHODS if name.endswith("plain")}
    assert 0 < needed["QLoRA, plain"] < needed["LoRA, 16-bit, plain"] < needed["full, plain"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "--gpus", "2"], "--gpus has no effect beside --table"),
        (["--table", "--memory-gb", "8"], "--memory-gb has no effect beside --table"),
        (["--model", "qwen3-8b", "--epochs", "3"], "--epochs has no effect without --dataset"),
    ],
)
def test_an_option_without_effect_is_refused(options: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        execute("estimate", options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_table_takes_another_rank_and_refuses_rows_that_cannot_be_trained(capsys: Capture) -> None:
    assert estimate(capsys, "--table", "--rank", "64")["qwen3-8b"]["QLoRA"] > 3
    with pytest.raises(UserError, match="max_length"):
        execute("estimate", ["--table", "--seq", "1"])


@pytest.mark.parametrize("flag", ["--memory-gb", "--card-gb", "--host-gb", "--seq", "--bs", "--accum", "--rank"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "many"])
def test_an_amount_is_a_number_above_zero(flag: str, value: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        execute("estimate", ["--model", "qwen3-8b", flag, value])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_what_is_missing_is_said_in_a_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        execute("estimate", ["--model", str(tmp_path)])
    folder = folder_of(tmp_path, {"model_type": "mamba"}, tiny_model_dir)
    with pytest.raises(UserError, match="has no 'num_attention_heads'"):
        execute("estimate", ["--model", folder])
    folder = folder_of(tmp_path, {"model_type": "llama"}, tiny_model_dir)
    with pytest.raises(UserError, match="has no 'num_attention_heads'"):
        execute("estimate", ["--model", folder])
    with pytest.raises(NoPlanError, match="the leanest needs"):
        execute("estimate", ["--model", "qwen3-32b", "--memory-gb", "1"])


def test_steps_and_hours_of_training_on_a_dataset(
    tiny_dataset_dir: Path, publish: Callable[..., str], capsys: Capture
) -> None:
    dataset = publish("dataset", {}, write=lambda folder: shutil.copytree(tiny_dataset_dir, folder, dirs_exist_ok=True))
    sizes = ("--seq", "512", "--bs", "1", "--accum", "2", "--epochs", "3")
    found = estimate(capsys, "--model", "qwen3-0.6b", "--dataset", dataset, *sizes)
    lengths = read_lengths(tiny_dataset_dir, "train")
    assert [found["examples"], found["tokens"]] == [4, sum(lengths)]
    assert found["packs"] == num_packs(lengths, 512)
    assert [found["steps_packed"], found["steps_one_by_one"]] == [3 * -(-found["packs"] // 2), 6]
    assert 0 < found["hours_packed"] <= found["hours_one_by_one"]


def test_another_artifact_is_no_dataset(publish: Callable[..., str]) -> None:
    adapter = publish("adapter", {"adapter_config.json": "{}"})
    with pytest.raises(UserError, match="is of the kind 'adapter', not 'dataset': give what chat-format printed"):
        execute("estimate", ["--model", "qwen3-0.6b", "--dataset", adapter])
