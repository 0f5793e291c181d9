"""Whole rows under tokenizers and templates that show one thing each: what is learned, read back token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.artifacts.rows import PreparedRow
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.example import Example
from finemill.components.chat_format.formatter import Formatter
from finemill.components.chat_format.template import ChatTemplate, ChatTemplates
from finemill.components.chat_format.tokenize import load_tokenizer
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape

Row = dict[str, Any]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def byte_tokenizer(*tokens: AddedToken | str, trim_offsets: bool = False) -> Tokenizer:
    """A token for each byte, in the way of GPT-2's, and `tokens`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=True) if isinstance(t, str) else t for t in tokens or CONTROL])
    return tokenizer


def word_tokenizer(*words: str) -> Tokenizer:
    """A token for each of `words`, spaces in them as in SentencePiece, and for each of their letters."""
    spaced = [word.replace(" ", "\u2581") for word in words]
    merges = [(word[:end], word[end]) for word in spaced for end in range(1, len(word))]
    names = sorted({letter for word in spaced for letter in word} | {"<unk>", "\u2581"})
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys([*names, *map("".join, merges)]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return tokenizer


class Base:
    """A base model's folder with a tokenizer and a chat template of the test's own."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, template: str = CHATML, eos_token: str = "<|im_end|>"):
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        self._folder, self._tokenizer, self._template = folder, tokenizer, template

    def examples(self, row: Row, **config: Any) -> list[Example]:
        """The training examples that chat-format makes of a row."""
        chat = load_tokenizer(self._folder)
        formatter = Formatter(
            chat, ChatTemplates(ChatTemplate(self._template, chat.named_tokens, "test")), ChatFormatConfig(**config)
        )
        record = PreparedRow(id="0", source="test", number=1, shape=detect_shape(row) or "", row="")
        drafts = formatter.drafts(record, row, unroll=True)
        examples = []
        for example in formatter.finish_all(drafts):
            if isinstance(example, DroppedRowError):
                raise example
            examples.append(example)
        return examples

    def learned(self, row: Row, **config: Any) -> list[str]:
        """The learned runs of all examples as text."""
        return [run for example in self.examples(row, **config) for run in self.runs(example)]

    def runs(self, example: Example) -> list[str]:
        runs: list[list[int]] = [[]]
        for label in example.labels.tolist():
            if label != IGNORE_INDEX:
                runs[-1].append(label)
            elif runs[-1]:
                runs.append([])
        return [self._tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]

    def text(self, example: Example) -> str:
        text: str = self._tokenizer.decode(example.input_ids, skip_special_tokens=False)
        return text


def pair(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("roles", "learned"),
    [
        (["assistant", "tool"], ["Dim it?<|im_end|>", "it is dim<|im_end|>", "Done.<|im_end|>"]),
        (["system", "user"], ["Be kind.<|im_end|>", "Dim!<|im_end|>", "Yes.<|im_end|>"]),
        (["assistant"], ["Dim it?<|im_end|>", "Done.<|im_end|>"]),
    ],
)
def test_turns_of_the_roles_that_are_named_are_learned(tmp_path: Path, roles: list[str], learned: list[str]) -> None:
    base = Base(tmp_path, byte_tokenizer())
    call = '<tool_call>\n{"name": "dim", "arguments": {"room": "hall"}}\n</tool_call>'
    turns = [("system", "Be kind."), ("user", "Dim!"), ("assistant", "Dim it?"), ("user", "Yes.")]
    messages: list[Row] = [{"role": role, "content": text} for role, text in turns]
    messages += [{"role": "assistant", "content": call, "weight": 0}]
    messages += [{"role": "tool", "content": "it is dim"}, {"role": "assistant", "content": "Done."}]
    (example,) = base.examples({"messages": messages}, learned=roles)
    assert base.runs(example) == learned
    assert set(example.end_tokens) <= {"<|im_end|>"}


def test_a_row_without_a_turn_of_the_roles_that_are_named_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(DroppedRowError, match=r"^no_learned_turn$"):
        Base(tmp_path, byte_tokenizer()).examples(pair("a", "b"), learned=["tool"])


def test_an_end_token_that_takes_in_the_line_break_after_it_is_learned(tmp_path: Path) -> None:
    """As Phi-3's, which are stripped to their right."""
    tokens = [AddedToken(text, special=True, rstrip=True) for text in CONTROL]
    base = Base(tmp_path, byte_tokenizer(*tokens))
    (example,) = base.examples(pair("Name a river.", "The Elbe."))
    assert base.runs(example) == ["The Elbe.<|im_end|>"]
    assert example.end_tokens == ["<|im_end|>"]


def test_white_space_is_learned_where_the_tokenizer_trims_its_offsets(tmp_path: Path) -> None:
    """As GPT-NeoX's."""
    code = "def f(x):\n    if x:\n        return 1, 2\n    return 3"
    base = Base(tmp_path, byte_tokenizer(trim_offsets=True))
    assert base.learned(pair("Write f.", code)) == [f"{code}<|im_end|>"]


def test_the_first_word_is_learned_where_its_token_begins_in_the_prompt(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} {% else %}A: {{ m.content }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    tokenizer = word_tokenizer("Q:", " A:", " The", " Elbe.", " Name", " it.")
    tokenizer.add_special_tokens(["</s>"])
    base = Base(tmp_path, tokenizer, template, "</s>")
    assert base.learned(pair("Name it.", "The Elbe.")) == [" The Elbe.</s>"]


def test_an_end_marker_of_plain_text_is_learned_to_its_last_piece(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %} END{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    base = Base(tmp_path, word_tokenizer("user: a", "assistant:", " b", " END\n", "\n"), template)
    (example,) = base.examples(pair("a", "b"))
    assert base.runs(example) == [" b END\n"]
    assert example.end_tokens == [None]


def test_an_answer_is_learned_letter_by_letter(tmp_path: Path) -> None:
    for number, answer in enumerate(
        ("    return x", "a\n", "\tb", "They end with </think> and go on.", "A <think> is a tag")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        base = Base(folder, byte_tokenizer())
        (example,) = base.examples(pair("Go on.", answer))
        assert base.runs(example) == [f"{answer}<|im_end|>"]
        assert base.text(example) == f"<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}{% else %}<\uff5cAssistant\uff5c>"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}"
)
ROLES = [
    AddedToken(text, special=False) for text in ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>")
]


@pytest.fixture
def deepseek(tmp_path: Path) -> Base:
    """Role tokens that are not special, and a prompt that opens a thinking block."""
    return Base(tmp_path, byte_tokenizer(*CONTROL, *ROLES), DEEPSEEK)


def test_thinking_is_learned_after_a_prompt_that_opens_it(deepseek: Base) -> None:
    assert deepseek.learned(pair("2+2?", "<think>\n2 and 2\n</think>\n\n4")) == ["2 and 2\n</think>\n\n4<|im_end|>"]


def test_an_answer_without_thinking_gets_an_empty_block_there_only_if_asked(deepseek: Base) -> None:
    with pytest.raises(DroppedRowError, match=r"^prompt_opens_thinking$"):
        deepseek.learned(pair("Say hi.", "Hi!"))
    assert deepseek.learned(pair("Say hi.", "Hi!"), enable_thinking=True) == ["\n</think>\n\nHi!<|im_end|>"]


def test_role_tokens_that_are_not_special_are_text_where_a_user_types_them(deepseek: Base) -> None:
    typed = "Say <\uff5cAssistant\uff5c> after <\uff5cUser\uff5c>."
    (example,) = deepseek.examples(pair(typed, "<think>\nhm\n</think>\n\nNo <\uff5cUser\uff5c>."))
    assert deepseek.runs(example) == ["hm\n</think>\n\nNo <\uff5cUser\uff5c>.<|im_end|>"]
    roles: list[Any] = [byte_tokenizer(*CONTROL, *ROLES).token_to_id(token.content) for token in ROLES[:2]]
    assert [example.input_ids.count(role) for role in roles] == [1, 1]


def test_a_rendered_chat_is_refused_or_learned_with_its_control_tokens(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer())
    text = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
    with pytest.raises(DroppedRowError, match=r"^rendered_chat$"):
        base.examples({"text": text})
    (example,) = base.examples({"text": text}, rendered_text="tokens")
    assert base.learned({"text": text}, rendered_text="tokens") == [text]
    start: Any = byte_tokenizer().token_to_id("<|im_start|>")
    assert example.input_ids.count(start) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"text": "[INST] Say hi. [/INST] Hi!"},
        {"text": "USER: Say hi. ASSISTANT: Hi!</s>"},
        {"text": "<s><|start_header_id|>user<|end_header_id|>\n\nSay hi."},
        {"text": "Chats:\n<start_of_turn>user\nSay hi.<end_of_turn>\n<start_of_turn>model\nHi!"},
        {"prompt": "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n", "completion": "Hi!<|im_end|>"},
        {"text": "### Human: Say hi.### Assistant: Hi!"},
        {"text": "Below is a task.\n\n### Instruction:\nSay hi.\n\n### Response:\nHi!"},
        {"text": "GPT4 Correct User: Say hi.<|end_of_turn|>GPT4 Correct Assistant: Hi!<|end_of_turn|>"},
        {"text": "<|im_user|>user<|im_middle|>Say hi.<|im_end|><|im_assistant|>assistant<|im_middle|>Hi!"},
        {"prompt": "### Instruction:\nSay hi.\n\n### Response:\n", "completion": "Hi!"},
    ],
)
def test_chats_rendered_for_any_family_are_refused(tmp_path: Path, row: Row) -> None:
    with pytest.raises(DroppedRowError, match=r"^rendered_chat$"):
        Base(tmp_path, byte_tokenizer()).examples(row)


def test_an_answer_that_brings_its_end_of_turn_has_one_and_keeps_what_it_mentions(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer())
    end: Any = byte_tokenizer().token_to_id("<|im_end|>")
    for answer in ("Hi!<|im_end|>", "Hi!\n<|im_end|>\n", "Hi!<|im_end|><|im_end|>"):
        (example,) = base.examples(pair("Say hi.", answer))
        assert base.runs(example) == ["Hi!<|im_end|>"]
    (example,) = base.examples(pair("How?", "Turns end with <|im_end|>"))
    assert base.runs(example) == ["Turns end with <|im_end|><|im_end|>"]
    assert example.input_ids.count(end) == 2


def test_a_document_begins_and_ends_as_the_tokenizer_has_it_and_only_once(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<bos>", "<|im_end|>")
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    base = Base(tmp_path, tokenizer)
    for text in ("The Elbe is a river.", "<bos>The Elbe is a river.<|im_end|>"):
        (example,) = base.examples({"text": text})
        assert example.input_ids == tokenizer.encode("The Elbe is a river.<|im_end|>").ids
        assert example.labels.tolist() == example.input_ids


@pytest.mark.parametrize(
    "sentence", ["The Elbe flows to Hamburg. ", "\u6613\u5317\u6cb3\u6d41", "word" * 5, "An <|im_end|> in a text. "]
)
def test_a_long_document_is_pieces_of_which_none_is_lost(sentence: str, tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer("<|im_end|>"))
    text = sentence * 50
    for limit in (16, 61, 200):
        pieces = base.examples({"text": text}, max_length=limit)
        lengths = [len(piece.input_ids) for piece in pieces]
        assert max(lengths) <= limit
        assert sum(lengths[:-1]) > 0.5 * limit * len(lengths[:-1])
        assert "".join(base.text(piece) for piece in pieces) == text + "<|im_end|>"
        assert all(piece.labels.tolist() == piece.input_ids for piece in pieces)
        assert len({piece.values["id"] for piece in pieces}) == len(pieces)


def test_a_text_that_is_cut_by_samples_of_it_loses_nothing_though_its_parts_differ(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer("<|im_end|>"))
    text = "The Elbe flows to Hamburg. " * 2000 + "\u6613\u5317\u6cb3\u6d41" * 8000
    pieces = base.examples({"text": text}, max_length=5000)
    assert max(len(piece.input_ids) for piece in pieces) <= 5000
    assert "".join(base.text(piece) for piece in pieces) == text + "<|im_end|>"


def test_an_end_token_that_is_cut_off_is_not_counted(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer())
    (example,) = base.examples(pair("Count.", "1 2 3 " * 40), max_length=60, truncation="truncate")
    assert example.end_tokens == [None]


SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *pair("Say hi.", "Hi!")["messages"]]}
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
FORGETS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES, FORGETS])
def test_a_system_message_that_the_template_takes_not_stands_before_the_first_question(
    tmp_path: Path, template: str
) -> None:
    base = Base(tmp_path, byte_tokenizer(), template)
    (example,) = base.examples(SYSTEM)
    assert base.text(example).startswith("<|im_start|>user\nBe brief.\n\nSay hi.<|im_end|>\n")
    assert base.runs(example) == ["Hi!<|im_end|>"]
    with pytest.raises(DroppedRowError, match=r"^template_without_system$"):
        base.examples(SYSTEM, unsupported_system="drop")
    with pytest.raises(UserError, match="row 0 of test has a system message, and the chat template takes none"):
        base.examples(SYSTEM, unsupported_system="error")


@pytest.mark.parametrize("template", [CHATML, REFUSES])
def test_tools_that_the_template_shows_not_are_texts_if_that_is_asked(tmp_path: Path, template: str) -> None:
    base = Base(tmp_path, byte_tokenizer(), template)
    tool = {"type": "function", "function": {"name": "dim", "parameters": {}}}
    calls = [{"type": "function", "function": {"name": "dim", "arguments": {"room": room}}} for room in ("a", "b")]
    row = {
        "messages": [
            {"role": "user", "content": "Dim."},
            {"role": "assistant", "content": "Both.", "tool_calls": calls},
            {"role": "tool", "content": "ok"},
            {"role": "tool", "content": "no"},
            {"role": "assistant", "content": "One is."},
        ],
        "tools": [tool],
    }
    (example,) = base.examples(row, unsupported_tools="fold")
    text = base.text(example)
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text.partition("Dim.")[0]
    result = "<|im_start|>user\n<tool_response>\nok\n</tool_response>\n<tool_response>\nno\n</tool_response><|im_end|>"
    assert result in text
    written = [f"<tool_call>\n{json.dumps({'name': 'dim', 'arguments': {'room': r}})}\n</tool_call>" for r in "ab"]
    assert base.runs(example) == ["\n".join(["Both.", *written]) + "<|im_end|>", "One is.<|im_end|>"]
    with pytest.raises(DroppedRowError, match=r"^template_without_tools$"):
        base.examples(row)
    with pytest.raises(UserError, match="row 0 of test has tools, and the chat template shows none"):
        base.examples(row, unsupported_tools="error")


def test_a_system_message_that_a_template_forgets_after_a_call_stands_before_the_first_question(tmp_path: Path) -> None:
    """Mistral v0.3's stands in the last message, if that is the user's."""
    template = WITH_CALLS.replace("ARGUMENTS", "(c.function.arguments | tojson)").replace(
        "{% for m in messages %}",
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if s and loop.last and m.role == 'user' %}{{ s }}\n{% endif %}",
    )
    base = Base(tmp_path, byte_tokenizer(), template)
    system = {"role": "system", "content": "Be brief."}
    (example,) = base.examples({"messages": [system, *CALLED], "tools": TOOLS})
    assert "<|im_start|>user\nBe brief.\n\nDim.<|im_end|>\n" in base.text(example)
    assert base.runs(example)[-1] == "Done.<|im_end|>"


def test_a_question_that_the_template_changes_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("m.content }}<", "m.content.split('|')[0] }}<")
    with pytest.raises(DroppedRowError, match=r"^template_changes_question$"):
        Base(tmp_path, byte_tokenizer(), template).examples(pair("a|b", "c"))


def test_turns_that_the_data_exclude_are_context(tmp_path: Path) -> None:
    turns = [*pair("2+2?", "5")["messages"], *pair("Sure?", "No: 4.")["messages"]]
    turns[1]["weight"] = 0
    base = Base(tmp_path, byte_tokenizer())
    (example,) = base.examples({"messages": turns})
    assert base.runs(example) == ["No: 4.<|im_end|>"]
    assert "assistant\n5<|im_end|>" in base.text(example)


CALL = {"type": "function", "function": {"name": "dim", "arguments": {"room": "h\u00e4ll"}}}
TOOLS = [{"type": "function", "function": {"name": "dim", "description": "Dim a light", "parameters": {}}}]
CALLED = [
    {"role": "user", "content": "Dim."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "Done."},
]
HERMES = [
    {"role": "user", "content": "Dim."},
    {"role": "assistant", "content": '<tool_call>\n{"name": "dim", "arguments": {"room": "h\u00e4ll"}}\n</tool_call>'},
    {"role": "tool", "content": "<tool_response>\nok\n</tool_response>"},
    {"role": "assistant", "content": "Done."},
]
WITH_CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name ~ ' ' ~ ARGUMENTS }}{% endfor %}",
).replace("{% for m", "{% if tools %}{{ tools | tojson }}{% endif %}{% for m", 1)


@pytest.mark.parametrize(
    "arguments", ["c.function.arguments | tojson", "'' + c.function.arguments", "c.function.arguments"]
)
def test_arguments_are_shown_as_json_whether_the_template_takes_objects_or_text(tmp_path: Path, arguments: str) -> None:
    base = Base(tmp_path, byte_tokenizer(), WITH_CALLS.replace("ARGUMENTS", f"({arguments})"))
    assert base.learned({"messages": CALLED, "tools": TOOLS}) == [
        'dim {"room": "h\u00e4ll"}<|im_end|>',
        "Done.<|im_end|>",
    ]


def test_calls_written_as_text_are_calls_where_the_template_takes_them(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer(), WITH_CALLS.replace("ARGUMENTS", "(c.function.arguments | tojson)"))
    (as_text,), (as_calls,) = (base.examples({"messages": messages}) for messages in (HERMES, CALLED))
    assert as_text.input_ids == as_calls.input_ids
    assert as_text.labels.tolist() == as_calls.labels.tolist()


def test_calls_written_as_text_stay_text_where_the_template_knows_none(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer())
    assert base.learned({"messages": HERMES}) == [f"{HERMES[1]['content']}<|im_end|>", "Done.<|im_end|>"]
    assert "<tool_response>\nok\n</tool_response>" in base.text(base.examples({"messages": HERMES})[0])


def test_of_a_text_of_many_megabytes_only_what_decides_is_encoded(tmp_path: Path) -> None:
    base = Base(tmp_path, byte_tokenizer())
    answer = "a long answer " * 200_000
    with pytest.raises(DroppedRowError, match=r"^too_long$") as reason:
        base.examples(pair("Hi.", answer), max_length=64)
    assert int(reason.value.field.removeprefix("more than ").split()[0]) < 5_000
    (example,) = base.examples(pair("Hi.", answer), max_length=64, truncation="truncate")
    (whole,) = base.examples(pair("Hi.", answer[:500]), max_length=64, truncation="truncate")
    assert example.input_ids == whole.input_ids
    assert example.labels.tolist() == whole.labels.tolist()
    assert example.end_tokens == [None]
