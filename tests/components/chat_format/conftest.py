"""Conversations, templates and the tokenizer that the tests of chat-format share."""

import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from finemill.components.chat_format.template import ChatTemplate, load_templates
from finemill.components.chat_format.tokenize import ChatTokenizer, load_tokenizer
from finemill.models.base.resolve import BUILTIN_MODELS

BASE = BUILTIN_MODELS["builtin:tiny-qwen3"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_rate",
            "description": "Exchange rate <&>",
            "parameters": {"type": "object", "properties": {"to": {"type": "string", "description": "Währung"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_rate", "arguments": {"to": "EUR", "days": [1, 2]}}}
Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str | None = None) -> Message:
    return {"role": "assistant", "content": text, **({"reasoning_content": reasoning} if reasoning else {})}


NAMED_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
CALL_RATE: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CALL_TWICE: Message = {**assistant("Let me see.", "I call."), "tool_calls": [CALL, CALL]}


def tool(text: str) -> Message:
    return {"role": "tool", "name": "get_rate", "content": text}


HISTORY = [user("a?"), assistant("A1."), user("b?"), assistant("B1.")]
THINKING_HISTORY = [user("a?"), assistant("A1.", "hm, a"), user("b?"), assistant("B1.", "hm, b")]
TOOL_ANSWERS = [tool("rate=1.1"), tool("rate=1.2")]
CONVERSATIONS: dict[str, tuple[list[Message], Any]] = {
    "single": ([user("Hi there"), assistant("Hello you")], None),
    "thinking": ([user("2+2?"), assistant("Four.", "2 + 2 = 4")], None),
    "history": ([{"role": "system", "content": "Be nice."}, *HISTORY], None),
    "thinking history": (THINKING_HISTORY, None),
    "tools": ([user("Rate?"), CALL_RATE, tool("rate=1.1"), assistant("It is 1.1.")], TOOLS),
    "tools with thinking": ([user("Rate?"), CALL_TWICE, *TOOL_ANSWERS, assistant("It is 1.1.", "I know.")], TOOLS),
}


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    """The built-in base model's."""
    return load_tokenizer(BASE)


@pytest.fixture(scope="session")
def template(tokenizer: ChatTokenizer) -> ChatTemplate:
    """Qwen3's, as the built-in base model has it."""
    return load_templates(BASE, None, tokenizer.named_tokens).default


@pytest.fixture(scope="session")
def conversations() -> dict[str, tuple[list[Message], Any]]:
    """Messages and tools by what they show."""
    return CONVERSATIONS


@pytest.fixture(scope="session")
def random_conversations() -> list[list[Message]]:
    """Two hundred conversations of odd texts, control tokens among them."""
    rng = Random(0)
    return [random_conversation(rng) for _ in range(200)]


@pytest.fixture(scope="session")
def published_sources() -> dict[str, str]:
    """The chat templates of published models that TRL carries, by name; nothing of TRL is imported."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the templates that TRL carries")
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


@pytest.fixture(scope="session")
def published_templates(published_sources: dict[str, str]) -> dict[str, ChatTemplate]:
    """The same, parsed."""
    return {name: ChatTemplate(source, NAMED_TOKENS, name) for name, source in published_sources.items()}


PLAIN = ("a", "é", "e\u0301", "你好", "🙂", " ", "\n", "\n\n", "\t", "42", "x^2", '"', "\\", "'", "#", "\u2028")
TEMPLATE_LIKE = ("<", "|", ">", "{", "}", "</think", "tool_call>", "{{ x }}", "{% if %}")
CONTROL = ("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>")
ALPHABET = PLAIN + TEMPLATE_LIKE + CONTROL


def random_text(rng: Random, *, inner: bool = True) -> str:
    pieces = ["x" if inner else "", *rng.choices(ALPHABET, k=rng.randint(1, 12)), "y" if inner else ""]
    return "".join(pieces)


def random_conversation(rng: Random) -> list[Message]:
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": random_text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append(user(random_text(rng, inner=rng.random() < 0.8) + "?"))
        if rng.random() < 0.3:
            arguments = {"to": random_text(rng)}
            call = {"type": "function", "function": {"name": "get_rate", "arguments": arguments}}
            messages.append({**assistant(rng.choice(["", random_text(rng)])), "tool_calls": [call]})
            messages.append({"role": "tool", "content": json.dumps({"rate": random_text(rng)})})
        messages.append(assistant(random_text(rng), random_text(rng) if rng.random() < 0.5 else None))
    return messages
