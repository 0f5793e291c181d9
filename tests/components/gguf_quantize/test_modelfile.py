"""Modelfiles. The expected texts were run through Ollama's own parser and template packages: equal to the letter."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finemill.components.gguf_quantize.modelfile import find_turns, modelfile

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKS_BY_ROLE = (
    "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM]{{ m.content }}[/SYSTEM]{% elif m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
OPENED_THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\n<think>\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '\n</think>\n\n' }}{% endif %}{% endif %}",
)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def body(tokenizer: Any, chat_template: str) -> str:
    """The Modelfile for another chat template, without its first line."""
    tokenizer.chat_template = chat_template
    first, _, rest = modelfile("m.gguf", tokenizer, [], {}).partition("\n")
    assert first == "FROM ./m.gguf"
    return rest


def test_chatml_is_a_loop_over_messages(tokenizer: Any) -> None:
    assert body(tokenizer, CHATML) == (
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\n'
    )


def test_a_default_system_prompt_is_said(tokenizer: Any) -> None:
    assert body(tokenizer, DEFAULT_SYSTEM + CHATML) == body(tokenizer, CHATML) + 'SYSTEM """You are kind."""\n'


def test_an_empty_system_turn_is_written_where_a_chat_brings_none(tokenizer: Any) -> None:
    dated = CHATML.replace("message['content']", "('Today.' if message.role == 'system' else '') + message['content']")
    assert body(tokenizer, DEFAULT_SYSTEM.replace("You are kind", "Today") + dated) == (
        'TEMPLATE """{{- if ne (index .Messages 0).Role "system" }}<|im_start|>system\nToday.<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\nToday.{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ else }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
    )


def test_the_first_token_is_left_to_llama_cpp(llama_dir: Path) -> None:
    assert body(AutoTokenizer.from_pretrained(llama_dir), LLAMA3) == (
        'TEMPLATE """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"""\n'
    )


def test_roles_with_marks_of_their_own(tokenizer: Any) -> None:
    assert body(tokenizer, MARKS_BY_ROLE) == (
        'TEMPLATE """{{- range .Messages }}{{ if eq .Role "system" }}[SYSTEM]{{ .Content }}[/SYSTEM]'
        '{{ else if eq .Role "assistant" }}{{ .Content }}</s>{{ else }}[INST]{{ .Content }}[/INST]{{ end }}'
        '{{ end }}"""\n'
    )


def test_thinking_is_left_out_of_the_history_and_can_be_switched_off(tokenizer: Any) -> None:
    assert body(tokenizer, tokenizer.chat_template) == (
        'TEMPLATE """{{- range $i, $_ := .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ if and .Thinking (eq (len (slice $.Messages $i)) 1) }}<think>\n{{ .Thinking }}\n</think>\n\n{{ end }}"
        "{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        '{{ if and $.IsThinkSet (not $.Think) }}<think>\n\n</think>\n\n{{ end }}"""\n'
    )


def test_an_answer_that_the_prompt_opens_with_thinking(tokenizer: Any) -> None:
    text = body(tokenizer, OPENED_THINKING)
    assert text.endswith(
        '<|im_start|>assistant\n<think>\n{{ if and $.IsThinkSet (not $.Think) }}\n</think>\n\n{{ end }}"""\n'
    )


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ raise_exception('no system message, please') }}",
        "{{ messages }}",
        # Contents are not written as they come.
        CHATML.replace("message['content']", "message['content'] | upper"),
        # What depends on the number of messages is no loop.
        CHATML + "{{ messages | length }}",
        # Ollama would execute it, end the value, or lose it.
        CHATML.replace("<|im_end|>", "{{ '{{ .X }}' }}"),
        CHATML.replace("<|im_end|>", '"""'),
        CHATML.replace("<|im_end|>", "\u200b"),
        None,
        DEFAULT_SYSTEM.replace("You are kind.", "Today is ' + strftime_now('%d %B %Y') + '.") + CHATML,
    ],
)
def test_a_template_that_is_no_loop_over_messages_is_left_to_ollama(tokenizer: Any, chat_template: str | None) -> None:
    tokenizer.chat_template = chat_template
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer, [], {})


def test_a_default_system_prompt_that_cannot_be_written_takes_the_template_with_it(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_SYSTEM.replace("kind", '"""kind"""') + CHATML
    assert find_turns(tokenizer)
    assert modelfile("m.gguf", tokenizer, [], {}) == "FROM ./m.gguf\n"


def test_stops_and_sampling_are_quoted_as_ollama_reads_them(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    stops = ["<|im_end|>", 'a"\nSYSTEM bad', 'say """', "zero\u200bwidth"]
    text = modelfile("m-Q4_K_M.gguf", tokenizer, stops, {"temperature": 0.6, "top_k": 20})
    assert text == (
        'FROM ./m-Q4_K_M.gguf\nPARAMETER stop "<|im_end|>"\nPARAMETER stop """a"\nSYSTEM bad"""\n'
        "PARAMETER temperature 0.6\nPARAMETER top_k 20\n"
    )
