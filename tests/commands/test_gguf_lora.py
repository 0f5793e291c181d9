from pathlib import Path

import gguf
import pytest

from finemill.commands.gguf_lora import execute
from finemill.errors import UserError


def test_an_adapter_becomes_a_file_and_a_line_that_runs_it(
    tiny_adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "adapter.gguf"
    arguments = [str(tiny_adapter_dir), "--base-model", "builtin:tiny-qwen3", "-o", str(output)]
    assert execute("gguf-lora", arguments) == 0
    reader = gguf.GGUFReader(output)
    assert reader.fields["adapter.type"].contents() == "lora"
    assert len(reader.tensors) == 2 * 6 * 7
    assert f"llama-server -m BASE.gguf --lora {output} --jinja" in capsys.readouterr().out


def test_a_model_that_is_no_adapter_and_a_missing_folder_are_named(
    tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is no adapter: pass what train-qlora or train-dpo printed"):
        execute("gguf-lora", [str(tiny_model_dir), "-o", str(tmp_path / "x.gguf")])
    arguments = [str(tiny_adapter_dir), "--base-model", "builtin:tiny-qwen3", "-o", str(tmp_path / "none/x.gguf")]
    with pytest.raises(UserError, match="none is no folder"):
        execute("gguf-lora", arguments)
