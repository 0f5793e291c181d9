from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from finemill.models.model_card import llama_cpp_command, serve_commands, write_card


def card(folder: Path, base_model: str) -> ModelCard:
    write_card(
        folder,
        title="mine",
        base_model=base_model,
        form="gguf",
        summary="What it is.",
        commands=[("llama.cpp", "llama-server -m a.gguf")],
        table={"a.gguf": {"KL": "0.1"}, "b.gguf": {"GB": "2"}},
    )
    return ModelCard((folder / "README.md").read_text())


def test_a_base_on_the_hub_is_named_in_the_metadata(tmp_path: Path) -> None:
    found = card(tmp_path, "hf://Qwen/Qwen3-0.6B@main")
    assert found.data.to_dict()["base_model"] == "Qwen/Qwen3-0.6B"
    assert found.data.to_dict()["base_model_relation"] == "quantized"
    assert "| a.gguf | 0.1 | |\n| b.gguf | | 2 |" in found.text


@pytest.mark.parametrize("base_model", ["builtin:tiny-qwen3", "file:///models/mine", ""])
def test_a_base_elsewhere_is_not(base_model: str, tmp_path: Path) -> None:
    assert "base_model" not in card(tmp_path, base_model).data.to_dict()


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("<\uff5cAssistant\uff5c><think>\n <\uff5ctool\u2581calls\u2581begin\uff5c>",
         ["--reasoning-parser deepseek_r1", "-parser deepseek_v3"]),
        ("<think> {{ x }} <tool_call>", ["--reasoning-parser qwen3", "--tool-call-parser hermes"]),
        ("[TOOL_CALLS]", ["--tool-call-parser mistral"]),
        ({"default": "x", "tool_use": "<|python_tag|>"}, ["--tool-call-parser llama3_json"]),
    ],
)  # fmt: skip
def test_the_template_says_which_parsers_read_it(template: object, parts: list[str]) -> None:
    line = dict(serve_commands(template))["vLLM"]
    assert all(part in line for part in parts)
    assert line.startswith("vllm serve .")


def test_a_template_without_thinking_or_tools_needs_no_parser() -> None:
    assert dict(serve_commands("{{ messages }}")) == {
        "vLLM": "vllm serve .",
        "SGLang": "python -m sglang.launch_server --model-path .",
    }
    assert serve_commands(None)[0] == ("vLLM", "vllm serve .")


def test_a_mixture_has_lines_that_spread_its_experts() -> None:
    lines = dict(serve_commands("<think>", num_experts=128))
    assert lines["vLLM, experts on two GPUs"] == f"{lines['vLLM']} --tensor-parallel-size 2 --enable-expert-parallel"
    assert lines["SGLang, experts on two GPUs"] == f"{lines['SGLang']} --tp-size 2 --ep-size 2"


def test_llama_cpp_gets_the_models_sampling() -> None:
    line = llama_cpp_command("a.gguf", {"temperature": 0.6, "top_p": 0.95, "repeat_penalty": 1.1})
    assert line == "llama-server -m a.gguf --jinja --temp 0.6 --top-p 0.95 --repeat-penalty 1.1"
