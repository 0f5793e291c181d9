"""The model card: README.md with the metadata that the Hugging Face hub reads, and how to run what lies beside it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from finemill.models.base.resolve import hub_name

CARD_FILE = "README.md"
Form = Literal["safetensors", "lora", "bitsandbytes", "fp8", "gptq", "gguf"]
# What the hub calls them beside their base, and the libraries that open them.
_RELATIONS: Mapping[Form, str] = {
    "safetensors": "finetune", "lora": "adapter", "bitsandbytes": "quantized", "fp8": "quantized",
    "gptq": "quantized", "gguf": "quantized",
}  # fmt: skip
_LIBRARIES: Mapping[Form, str] = {"gguf": "gguf", "lora": "peft"}
# What a chat template writes -> the parsers of vLLM and SGLang that read it; the first that is there counts.
_REASONING = {"<\uff5cAssistant\uff5c><think>": ("deepseek_r1", "deepseek-r1"), "<think>": ("qwen3", "qwen3")}
_TOOLS = {
    "<function=": ("qwen3_coder", "qwen3_coder"), "<tool_call>": ("hermes", "qwen25"),
    "[TOOL_CALLS]": ("mistral", "mistral"), "<|python_tag|>": ("llama3_json", "llama3"),
    "<\uff5ctool\u2581calls\u2581begin\uff5c>": ("deepseek_v3", "deepseekv3"),
}  # fmt: skip


class CardText(NamedTuple):
    """What the card of a merged model in fewer bits says of its form."""

    title: str
    form: Form
    summary: str


def write_card(
    folder: Path,
    *,
    title: str,
    base_model: str,
    form: Form,
    summary: str,
    commands: Sequence[tuple[str, str]],
    table: Mapping[str, Mapping[str, str]],
    chain: Mapping[str, Mapping[str, str]] = {},
) -> None:
    """Write README.md.

    Args:
        base_model: reference of the base; named in the metadata if it is on the hub.
        form: what kind of weights lie there.
        commands: (program, command line) of each way to run it.
        table: measured values, by row and column.
        chain: each form of the model from training on, against the one before it, with 95 % intervals.
    """
    from huggingface_hub import ModelCardData

    on_hub = hub_name(base_model)
    data = ModelCardData(
        base_model=on_hub[0] if on_hub else None,
        base_model_relation=_RELATIONS[form] if on_hub else None,
        library_name=_LIBRARIES.get(form, "transformers"),
        pipeline_tag="text-generation",
        tags=["finemill", form, "conversational"],
        model_name=None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", summary]
    parts += ["## Run", *(f"{program}:\n\n```sh\n{line}\n```" for program, line in commands)]
    if table:
        parts += ["## Measured", _table(table)]
    if chain:
        parts += ["## From training to here", _table(chain)]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def serve_commands(chat_template: object, *, num_experts: int = 0) -> list[tuple[str, str]]:
    """Lines that serve the folder in vLLM and SGLang, with parsers for the template's thinking and tools.

    Args:
        num_experts: of a layer; 0 for a dense model. Experts can be spread over several GPUs.
    """
    text = chat_template if isinstance(chat_template, str) else json.dumps(chat_template, ensure_ascii=False)
    vllm, sglang = ["vllm serve ."], ["python -m sglang.launch_server --model-path ."]
    if reasoning := _parsers(text, _REASONING):
        vllm.append(f"--reasoning-parser {reasoning[0]}")
        sglang.append(f"--reasoning-parser {reasoning[1]}")
    if tools := _parsers(text, _TOOLS):
        vllm.append(f"--enable-auto-tool-choice --tool-call-parser {tools[0]}")
        sglang.append(f"--tool-call-parser {tools[1]}")
    lines = [("vLLM", " ".join(vllm)), ("SGLang", " ".join(sglang))]
    if num_experts:
        spread = (["--tensor-parallel-size 2 --enable-expert-parallel"], ["--tp-size 2 --ep-size 2"])
        lines += [
            (f"{program}, experts on two GPUs", " ".join([line, *flags]))
            for (program, line), flags in zip(lines, spread, strict=True)
        ]
    return lines


def llama_cpp_command(file: str, sampling: Mapping[str, float]) -> str:
    """The line that serves a GGUF file in llama.cpp with the chat template inside it.

    Args:
        sampling: values by llama.cpp's names (`repeat_penalty`).
    """
    flags = {"temperature": "temp"}
    values = [f"--{flags.get(name, name).replace('_', '-')} {value:g}" for name, value in sampling.items()]
    return " ".join([f"llama-server -m {file} --jinja", *values])


def _parsers(template: str, known: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    return next((parsers for mark, parsers in known.items() if mark in template), None)


def _table(rows: Mapping[str, Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "\n".join(re.sub(r" +", " ", f"| {' | '.join(line)} |") for line in lines)
