import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.components.chat_format.mask import Rendered, label_tokens, render_turns, without_broken
from finemill.components.chat_format.template import BROKEN, ChatTemplate
from finemill.components.chat_format.tokenize import ChatTokenizer
from finemill.rows.reasons import DroppedRowError

Conversations = dict[str, tuple[list[dict[str, Any]], Any]]
# Control tokens of all published templates.
CONTROL = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c]+\uff5c>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|<\|?channel\|?>|<eos>|</s>"
)


def render(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, kwargs: Mapping[str, Any]
) -> tuple[Rendered, list[str]]:
    rendered = render_turns(template, template.prepare(messages), tools, kwargs, CONTROL)
    return rendered, [rendered.text[turn.start : turn.end] for turn in rendered.turns]


@pytest.mark.parametrize(
    ("shown", "thinking", "expected"),
    [
        ("single", False, ["Hello you<|im_end|>"]),
        ("single", True, ["<think>\n\n</think>\n\nHello you<|im_end|>"]),
        ("thinking", True, ["<think>\n2 + 2 = 4\n</think>\n\nFour.<|im_end|>"]),
        ("history", False, ["A1.<|im_end|>", "B1.<|im_end|>"]),
        ("thinking history", True, ["A1.<|im_end|>", "<think>\nhm, b\n</think>\n\nB1.<|im_end|>"]),
        (
            "tools",
            False,
            [
                '<tool_call>\n{"name": "get_rate", "arguments": {"to": "EUR", "days": [1, 2]}}\n</tool_call><|im_end|>',
                "It is 1.1.<|im_end|>",
            ],
        ),
    ],
)
def test_qwen3_turns_are_what_the_model_must_produce(
    template: ChatTemplate, conversations: Conversations, shown: str, thinking: bool, expected: list[str]
) -> None:
    rendered, turns = render(template, *conversations[shown], {"enable_thinking": thinking})
    assert turns == expected
    assert rendered.text.startswith(rendered.prompt)
    assert rendered.turns[-1].start == len(rendered.prompt)


def test_a_turn_whose_thinking_the_template_leaves_out_is_incomplete(
    template: ChatTemplate, conversations: Conversations
) -> None:
    rendered, _ = render(template, *conversations["thinking history"], {"enable_thinking": True})
    assert [turn.complete for turn in rendered.turns] == [False, True]
    rendered, _ = render(template, *conversations["tools with thinking"], {"enable_thinking": True})
    assert [turn.complete for turn in rendered.turns] == [True, True]


def test_turns_are_found_in_published_templates(
    published_templates: dict[str, ChatTemplate], conversations: Conversations
) -> None:
    """Each turn holds the assistant's text and nothing of others; what is not found is refused, never guessed."""
    found = 0
    for name, template in published_templates.items():
        for shown, (messages, tools) in conversations.items():
            try:
                rendered, turns = render(template, messages, tools, {"enable_thinking": "thinking" in shown})
            except DroppedRowError:
                continue
            said = [message for message in messages if message["role"] == "assistant"]
            for message, turn, text in zip(said, rendered.turns, turns, strict=True):
                assert message["content"] in text, (name, shown)
                assert not turn.complete or message.get("reasoning_content", "") in text, (name, shown)
                assert turn.end_token is None or text.endswith(turn.end_token)
            for message in messages:
                if message["role"] != "assistant":
                    complete = [text for text, turn in zip(turns, rendered.turns, strict=True) if turn.complete]
                    assert not any(message["content"] in text for text in complete), (name, shown)
            found += 1
    assert found > 200


def test_generation_markers_give_the_same_turns_as_the_same_template_without_them(
    published_templates: dict[str, ChatTemplate], conversations: Conversations
) -> None:
    compared = 0
    for name, template in published_templates.items():
        if "generation %}" not in template.source or "endgeneration" not in template.source:
            continue
        bare = ChatTemplate(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template.source), {}, name)
        marked = ChatTemplate(template.source, {}, name)
        for shown in ("single", "history"):
            try:
                expected = render(bare, *conversations[shown], {"enable_thinking": False})[1]
            except DroppedRowError:
                continue
            assert [turn.strip() for turn in render(marked, *conversations[shown], {"enable_thinking": False})[1]] == [
                turn.strip() for turn in expected
            ], name
            compared += 1
    assert compared > 40


def test_generation_markers_cover_what_transformers_marks(
    published_templates: dict[str, ChatTemplate], conversations: Conversations
) -> None:
    """Within the marked text only what the prompt holds already, and what follows the end of turn, is not learned."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = published_templates["qwen3_training"]
    for shown in ("single", "thinking", "history"):
        messages, tools = conversations[shown]
        kwargs = {"enable_thinking": True}
        texts, spans = render_jinja_template(
            [messages], tools, None, template.source, return_assistant_tokens_mask=True, **kwargs
        )
        marked = [texts[0][start:end].rstrip("\n") for start, end in spans[0]]
        assert render(template, messages, tools, kwargs)[1] == marked


def test_a_template_without_message_loop_is_refused(conversations: Conversations) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages[-1].content }}", {}, "test")
    with pytest.raises(DroppedRowError, match="template_without_loop_over_messages"):
        render(template, *conversations["single"], {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "template_changes_answer"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "template_without_tool_calls"),
    ],
)
def test_a_template_that_does_not_show_the_answer_is_refused(
    conversations: Conversations, source: str, reason: str
) -> None:
    shown = {"template_changes_answer": "single"}.get(reason, "tools")
    with pytest.raises(DroppedRowError, match=reason):
        render(ChatTemplate(source, {}, "test"), *conversations[shown], {})


def test_a_turn_is_incomplete_where_the_template_cuts_the_thinking_out_of_its_content(
    conversations: Conversations,
) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", {}, "test")
    rendered, turns = render(template, *conversations["thinking"], {})
    assert (turns, rendered.turns[-1].complete) == (["\n\nFour."], False)


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def test_thinking_follows_a_prompt_that_opens_it_though_the_template_cuts_it_out(conversations: Conversations) -> None:
    rendered, turns = render(ChatTemplate(R1, {}, "test"), *conversations["thinking"], {})
    assert rendered.text == "<|user|>2+2?<|assistant|><think>\n2 + 2 = 4\n</think>\n\nFour.<|end|>"
    assert turns == ["2 + 2 = 4\n</think>\n\nFour.<|end|>"]
    assert rendered.turns[-1].complete
    rendered, turns = render(ChatTemplate(R1, {}, "test"), *conversations["thinking history"], {})
    assert turns == ["\n\nA1.<|end|>", "hm, b\n</think>\n\nB1.<|end|>"]
    assert [turn.complete for turn in rendered.turns] == [False, True]


def test_an_answer_without_thinking_does_not_follow_a_prompt_that_opens_it(conversations: Conversations) -> None:
    with pytest.raises(DroppedRowError, match=r"^prompt_opens_thinking$"):
        render(ChatTemplate(R1, {}, "test"), *conversations["single"], {})


def test_an_answer_that_follows_another_prompt_than_generation_gives_is_refused(conversations: Conversations) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    source += "{% if add_generation_prompt %}<|assistant|>Sure: {% endif %}"
    with pytest.raises(DroppedRowError, match=r"^template_changes_prompt$"):
        render(ChatTemplate(source, {}, "test"), *conversations["single"], {})


def test_the_last_answer_follows_the_prompt_where_answered_questions_are_written_otherwise(
    conversations: Conversations,
) -> None:
    """As Mistral's template, which puts the system prompt into the last message if that is the user's."""
    source = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% if loop.last and system %}{{ system }} {% endif %}"
        "{{ m.content }}<|/user|>{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    rendered, turns = render(ChatTemplate(source, {}, "test"), *conversations["history"], {})
    assert rendered.text == "<|user|>a?<|/user|>A1.<|end|><|user|>Be nice. b?<|/user|>B1.<|end|>"
    assert turns == ["A1.<|end|>", "B1.<|end|>"]
    assert rendered.text.startswith(rendered.prompt)


def test_labels_are_the_ids_inside_the_spans_and_ignored_elsewhere() -> None:
    ids = np.array([5, 6, 7, 8, 9], np.int32)
    offsets = np.array([[0, 2], [2, 3], [3, 6], [6, 6], [6, 8]])
    assert label_tokens(ids, offsets, [(2, 6)]).tolist() == [-100, 6, 7, -100, -100]
    assert label_tokens(ids, offsets, []).tolist() == [-100] * 5


def test_a_token_across_the_edge_of_a_span_is_learned_and_so_is_an_empty_one_inside() -> None:
    ids = np.array([5, 6, 7, 8, 9], np.int32)
    offsets = np.array([[0, 2], [2, 3], [3, 6], [6, 6], [6, 8]])
    assert label_tokens(ids, offsets, [(1, 2), (4, 7)]).tolist() == [5, -100, 7, 8, 9]
    assert label_tokens(ids, offsets, [(6, 8)]).tolist() == [-100, -100, -100, 8, 9]


def test_positions_move_when_break_marks_are_taken_out() -> None:
    text = f"ab{BROKEN}c{BROKEN}d"
    assert without_broken(text, [0, 2, 3, 6]) == [0, 2, 2, 4]


def test_masks_decode_to_exactly_what_the_assistant_says(
    template: ChatTemplate, tokenizer: ChatTokenizer, random_conversations: list[list[dict[str, Any]]]
) -> None:
    from tokenizers import Tokenizer

    from finemill.models.base.resolve import BUILTIN_MODELS

    decoder = Tokenizer.from_file(str(BUILTIN_MODELS["builtin:tiny-qwen3"] / "tokenizer.json"))
    checked = 0
    for messages in random_conversations:
        try:
            rendered = render_turns(
                template, tokenizer.break_control_tokens(messages), None, {"enable_thinking": True}, tokenizer.control
            )
        except DroppedRowError:
            # A random text may hold </think>, which Qwen3's template looks for.
            continue
        (tokens,) = tokenizer.encode([rendered.text])
        assert tokens is not None
        edges = without_broken(rendered.text, [edge for turn in rendered.turns for edge in (turn.start, turn.end)])
        plain = rendered.text.replace(BROKEN, "")
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            labels = label_tokens(tokens.input_ids, tokens.offsets, tokens.places(plain, [(start, end)]))
            learned = labels != IGNORE_INDEX
            assert (labels[learned] == tokens.input_ids[learned]).all()
            text = decoder.decode(labels[learned].tolist(), skip_special_tokens=False)
            # The tokenizer composes é from e and its accent.
            assert text.replace("é", "e\u0301") == plain[start:end].replace("é", "e\u0301")
            checked += 1
    assert checked > 300
