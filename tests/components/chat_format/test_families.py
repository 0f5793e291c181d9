"""What is learned under the templates of the usual families, read back from token ids."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.artifacts.rows import PreparedRow
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.example import Example
from finemill.components.chat_format.formatter import load_formatter
from finemill.components.chat_format.named_templates import CONTROL_TOKENS
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError

Row = dict[str, Any]
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
GPT_OSS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
DEEPSEEK = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
)
# Written after the models' documentation, as Mistral v0.3 and Tekken, Zephyr and Phi-4 have no template in TRL.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]SPACE{{ m.content }}[/INST]"
    "{% else %}SPACE{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
CHAT = [("user", "Name a river."), ("assistant", "The Elbe: 1,094 km."), ("user", "Another."), ("assistant", "Po.")]
MESSAGES = [{"role": role, "content": text} for role, text in CHAT]


def save_base(folder: Path, tokens: tuple[str, ...], template: str | None, bos: str | None, eos: str) -> Path:
    """A base model's folder with a token for each byte and for each control token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in dict.fromkeys((*tokens, eos, bos or eos))])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "eos_token": eos,
        **({"bos_token": bos} if bos else {}),
        **({"chat_template": template} if template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def examples(base: Path, row: Row, **config: Any) -> list[Example]:
    formatter = load_formatter(base, ChatFormatConfig(**config))
    shape = "text" if "text" in row else "messages"
    record = PreparedRow(id="0", source="test", number=1, shape=shape, row="")
    found = list(formatter.finish_all(formatter.drafts(record, row, unroll=True)))
    assert not any(isinstance(example, DroppedRowError) for example in found)
    return [example for example in found if isinstance(example, Example)]


def learned(base: Path, row: Row, **config: Any) -> list[str]:
    """The learned runs of tokens of all examples as text."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    runs: list[list[int]] = []
    for example in examples(base, row, **config):
        before = IGNORE_INDEX
        for label in example.labels.tolist():
            if label != IGNORE_INDEX and before == IGNORE_INDEX:
                runs.append([])
            if label != IGNORE_INDEX:
                runs[-1].append(label)
            before = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


ANSWERS = ["The Elbe: 1,094 km.", "Po."]


@pytest.mark.parametrize(
    ("template", "tokens", "bos", "eos", "before", "after"),
    [
        ("trl:qwen2_5", CHATML, None, "<|im_end|>", "", "<|im_end|>"),
        ("trl:qwen3_instruct_2507", CHATML, None, "<|im_end|>", "", "<|im_end|>"),
        ("trl:llama3", LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "", "<|eot_id|>"),
        ("trl:llama3_1", LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "", "<|eot_id|>"),
        ("trl:llama3_2", LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "", "<|eot_id|>"),
        ("trl:gemma", GEMMA, "<bos>", "<eos>", "", "<end_of_turn>"),
        ("trl:gemma3", GEMMA, "<bos>", "<eos>", "", "<end_of_turn>"),
        ("trl:phi3", ("<|user|>", "<|assistant|>", "<|end|>"), None, "<|endoftext|>", "", "<|end|>"),
        (MISTRAL.replace("SPACE", " "), ("[INST]", "[/INST]"), "<s>", "</s>", " ", "</s>"),
        (MISTRAL.replace("SPACE", ""), ("[INST]", "[/INST]"), "<s>", "</s>", "", "</s>"),
        (ZEPHYR, ("<|user|>", "<|assistant|>"), "<s>", "</s>", "", "</s>"),
        (PHI4, ("<|im_start|>", "<|im_end|>", "<|im_sep|>"), None, "<|im_end|>", "", "<|im_end|>"),
    ],
)
def test_every_answer_is_learned_with_its_end_and_nothing_else(
    tmp_path: Path,
    published_sources: dict[str, str],
    template: str,
    tokens: tuple[str, ...],
    bos: str | None,
    eos: str,
    before: str,
    after: str,
) -> None:
    source = published_sources[template.removeprefix("trl:")] if template.startswith("trl:") else template
    base = save_base(tmp_path, tokens, source, bos, eos)
    assert learned(base, {"messages": MESSAGES}) == [f"{before}{answer}{after}" for answer in ANSWERS]


def test_gpt_oss_learns_the_channels_with_thinking_in_its_own(
    tmp_path: Path, published_sources: dict[str, str]
) -> None:
    base = save_base(tmp_path, GPT_OSS, published_sources["gptoss"], None, "<|return|>")
    thought = {"messages": [MESSAGES[0], {**MESSAGES[1], "thinking": "A long one."}]}
    analysis = "<|channel|>analysis<|message|>A long one.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>The Elbe: 1,094 km.<|return|>"
    assert learned(base, thought) == [f"{analysis}{final}"]


CALL = {"id": "a", "type": "function", "function": {"name": "dim", "arguments": {"room": "hall"}}}
CALLED: list[Row] = [
    {"role": "user", "content": "Dim."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "ok"},
    {"role": "assistant", "content": "Done."},
]
TOOLS = [{"type": "function", "function": {"name": "dim", "description": "d", "parameters": {"type": "object"}}}]


def test_gemma_4_learns_a_call_and_the_answer_after_its_result_which_are_one_turn(
    tmp_path: Path, published_sources: dict[str, str]
) -> None:
    tokens = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
    base = save_base(tmp_path, tokens, published_sources["gemma4"], "<bos>", "<eos>")
    assert learned(base, {"messages": CALLED, "tools": TOOLS}) == [
        '<|tool_call>call:dim{room:<|"|>hall<|"|>}<tool_call|><|tool_response>',
        "Done.<turn|>",
    ]


def test_turns_whose_thinking_a_template_leaves_out_wherever_they_stand_are_counted(
    tmp_path: Path, published_sources: dict[str, str]
) -> None:
    """Llama 3.1's shows no text beside a call, and so no thinking."""
    base = save_base(tmp_path, LLAMA3, published_sources["llama3_1"], "<|begin_of_text|>", "<|eot_id|>")
    thought = {**CALLED[1], "reasoning_content": "The hall."}
    row = {"messages": [CALLED[0], thought, *CALLED[2:]], "tools": TOOLS}
    (example,) = examples(base, row)
    assert learned(base, row) == ["Done.<|eot_id|>"]
    assert example.draft.left_out == {"template_removes_thinking": 1}


def test_deepseek_r1_distills_learn_thinking_after_the_prompt_that_opens_it(
    tmp_path: Path, published_sources: dict[str, str]
) -> None:
    base = save_base(tmp_path, DEEPSEEK, published_sources["deepseek_r1_distill"], DEEPSEEK[0], DEEPSEEK[1])
    thought = {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "A long one."}]}
    assert learned(base, thought) == [f"A long one.\n</think>\n\nThe Elbe: 1,094 km.{DEEPSEEK[1]}"]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("chatml", "", "<|im_end|>"),
        ("qwen", "", "<|im_end|>"),
        ("llama3", "", "<|eot_id|>"),
        ("gemma", "", "<end_of_turn>"),
        ("mistral", " ", "</s>"),
        ("vicuna", " ", "</s>"),
        ("alpaca", "", "</s>"),
    ],
)
@pytest.mark.parametrize("bos", ["<s>", None])
def test_templates_by_name_serve_bases_that_have_none(
    tmp_path: Path, name: Any, before: str, after: str, bos: str | None
) -> None:
    base = save_base(tmp_path, CONTROL_TOKENS[name], None, bos, "</s>")
    assert learned(base, {"messages": MESSAGES}, chat_template=name) == [f"{before}{a}{after}" for a in ANSWERS]
    system = {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}
    (example,) = examples(base, system, chat_template=name)
    text = Tokenizer.from_file(str(base / "tokenizer.json")).decode(example.input_ids, skip_special_tokens=False)
    assert text.count("Be brief.") == 1
    assert (text.count("<s>") == 1) == (bos is not None and name not in ("chatml", "qwen"))


def test_the_named_template_qwen_has_thinking_and_tools(tmp_path: Path) -> None:
    base = save_base(tmp_path, CONTROL_TOKENS["qwen"], None, None, "<|im_end|>")
    call = {"type": "function", "function": {"name": "dim", "arguments": {"room": "hall"}}}
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Dim."},
            {"role": "assistant", "content": "", "reasoning_content": "A call.", "tool_calls": [call, call]},
            {"role": "tool", "content": "ok"},
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [{"name": "dim", "description": "Dim a light", "parameters": {}}],
    }
    written = '<tool_call>\n{"name": "dim", "arguments": {"room": "hall"}}\n</tool_call>'
    assert learned(base, row, chat_template="qwen") == [
        f"<think>\nA call.\n</think>\n\n{written}\n{written}<|im_end|>",
        "Done.<|im_end|>",
    ]


def test_a_named_template_needs_its_control_tokens(tmp_path: Path) -> None:
    base = save_base(tmp_path, (), None, None, "</s>")
    with pytest.raises(UserError, match=r"chat_template chatml needs the tokens <\|im_start\|>, <\|im_end\|>"):
        load_formatter(base, ChatFormatConfig(chat_template="chatml"))


def test_texts_need_no_template_and_chats_say_which_there_are(tmp_path: Path) -> None:
    base = save_base(tmp_path, (), None, "<s>", "</s>")
    assert learned(base, {"text": "The Elbe is a river."}) == ["The Elbe is a river.</s>"]
    with pytest.raises(UserError, match=r"set chat_template to a name \(alpaca, chatml, gemma,"):
        examples(base, {"messages": MESSAGES})


def test_every_token_is_learned_if_asked_for(tmp_path: Path) -> None:
    base = save_base(tmp_path, CONTROL_TOKENS["chatml"], None, None, "<|im_end|>")
    (example,) = examples(base, {"messages": MESSAGES}, chat_template="chatml", learned="all")
    assert example.labels.tolist() == example.input_ids
