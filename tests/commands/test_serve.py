import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from finemill.cli import main
from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.write import write_gguf

BASE = "builtin:tiny-qwen3"


def test_the_line_for_vllm_names_base_and_adapter(
    tiny_adapter_dir: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_adapter_dir), "--base-model", BASE, "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"vllm serve {tiny_model_dir} ")
    assert f"--lora-modules {tiny_adapter_dir.name}={tiny_adapter_dir}" in line
    # vLLM takes no smaller rank.
    assert "--max-lora-rank 8 " in line


@pytest.mark.parametrize(
    ("name", "value"), [("use_dora", True), ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [5])]
)
def test_an_adapter_that_vllm_does_not_take_is_to_be_merged(
    name: str, value: object, tiny_adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    assert main(["serve", str(adapter), "--base-model", BASE, "--dry-run"]) == 2
    assert f"the adapter has {name}, and vLLM adds LoRA on linear layers only: merge it" in capsys.readouterr().err


def test_without_vllm_the_line_is_printed_and_the_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", BASE]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("vllm serve ")
    assert "vLLM is not installed here" in shown.err


def test_an_address_is_served_already(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "http://127.0.0.1:9/v1"]) == 2
    assert "is served already" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_a_gguf_file_is_served_until_it_is_ended(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(SourceModel(tiny_model_dir), path, "Q8_0", "small", 1)
    command = [sys.executable, "-m", "finemill", "serve", str(path), "--port", "0", "--context-length", "256"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"llama-server --model {path} --alias small --jinja --ctx-size 256")
        address = process.stdout.readline().split()[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert b'"small"' in opener.open(f"{address}/models", timeout=30).read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
