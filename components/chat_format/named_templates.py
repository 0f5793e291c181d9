"""Chat templates by name, for bases that have none: `templates/NAME.jinja`."""

from pathlib import Path
from typing import Literal

TemplateName = Literal["alpaca", "chatml", "gemma", "llama3", "mistral", "qwen", "vicuna"]

CONTROL_TOKENS: dict[TemplateName, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "vicuna": (),
}
"""Tokens that a template writes besides BOS and the end-of-text token; a tokenizer without them would write letters."""


def read_named_template(name: TemplateName) -> str:
    """The template's source."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
