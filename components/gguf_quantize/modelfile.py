"""A Modelfile, so that `ollama create NAME -f Modelfile` gives the model with its own turns and stop marks."""

from typing import Any

# `.Messages` holds system messages as well.
_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_LLAMA3 = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""
_MARKS = {"<|im_start|>": _CHATML, "<|start_header_id|>": _LLAMA3}


def modelfile(gguf_name: str, tokenizer: Any, stop_texts: list[str], sampling: dict[str, float]) -> str:
    """Text of the Modelfile.

    Ollama cannot run a Jinja template: a chat template in ChatML or Llama 3's form gets its counterpart in Go's
    template language, without tools; for any other, Ollama's own detection from the GGUF file stands.

    Args:
        stop_texts: what ends a turn.
        sampling: Ollama's parameter names with the model's recommended values.
    """
    lines = [f"FROM ./{gguf_name}"]
    template = next((text for mark, text in _MARKS.items() if mark in (tokenizer.chat_template or "")), None)
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{text}"' for text in stop_texts]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    return "\n".join(lines) + "\n"
