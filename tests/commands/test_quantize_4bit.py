"""A base in 4 bits, from a model and rows, by a command."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finemill.artifacts.four_bit import read_four_bit
from finemill.commands.quantize_4bit import execute
from finemill.errors import UserError
from finemill.models.causal_lm import load_causal_lm


def test_a_model_and_rows_become_a_base_a_table_and_a_plot(
    short_model_dir: Path, tiny_dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "base", tmp_path / "kl.svg"
    arguments = [str(short_model_dir), "--rows", str(tiny_dataset_dir), "--output", str(output), "--plot", str(plot)]
    assert execute("quantize-4bit", [*arguments, "--size", "+25%", "--num-rows", "4"]) == 0
    record = read_four_bit(output)
    assert record is not None
    assert record.plain.size_bytes < record.written.size_bytes <= 1.25 * record.plain.size_bytes
    assert record.written.kl < record.plain.kl
    skipped = json.loads((output / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert set(skipped) >= {"lm_head", *record.kept}
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert weights == pytest.approx(record.written.size_bytes, rel=0.02)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| plain NF4", "| NF4, +25%", "| 2%"]
    assert plot.read_text().count("<polyline") == 2
    assert load_causal_lm(output).config.quantization_config.load_in_4bit
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--size": "10"}, r"--size 10: write what 16-bit layers may add \(\+10%\), or a whole size"),
        ({"--size": "1MB"}, r"--size 1MB: with NF4 in every linear layer the weights take 1\.\d+ MB already"),
        ({"--output": "."}, r"\. exists: choose another --output"),
        ({"--output": "nowhere/base"}, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    changed: dict[str, str], message: str, short_model_dir: Path, tiny_dataset_dir: Path, tmp_path: Path
) -> None:
    options = {"--rows": str(tiny_dataset_dir), "--output": str(tmp_path / "base"), "--num-rows": "2"} | changed
    with pytest.raises(UserError, match=message):
        execute("quantize-4bit", [str(short_model_dir), *(word for pair in options.items() for word in pair)])


def test_a_base_in_4_bits_and_a_mixture_are_refused(
    four_bit_dir: Path, tiny_mixture_dir: Path, tiny_dataset_dir: Path, tmp_path: Path
) -> None:
    for folder, message in ((four_bit_dir, "is in 4 bits already"), (tiny_mixture_dir, "is a mixture of experts")):
        with pytest.raises(UserError, match=message):
            execute("quantize-4bit", [str(folder), "--rows", str(tiny_dataset_dir), "--output", str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights[:1520],
            r"token id \d+, the model only 1520 tokens: it was made for another tokenizer",
        ),
        (lambda weights: weights * math.nan, "the model computes NaN or infinity"),
    ],
)
def test_rows_of_another_tokenizer_and_a_damaged_model_are_one_line(
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    short_model_dir: Path,
    tiny_dataset_dir: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(short_model_dir, tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(weights[name])}))
    with pytest.raises(UserError, match=message):
        execute("quantize-4bit", [str(folder), "--rows", str(tiny_dataset_dir), "--output", str(tmp_path / "x")])
