import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finemill.components.chat_format import template as template_module
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.template import ChatTemplate, load_templates, template_state
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.tracking.settings import NOWHERE

Conversations = dict[str, tuple[list[dict[str, Any]], Any]]


def test_published_templates_render_as_in_transformers(
    published_templates: dict[str, ChatTemplate], conversations: Conversations
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    rendered = 0
    for name, template in published_templates.items():
        for shown, (messages, tools) in conversations.items():
            prepared = template.prepare(messages)
            for prompt in (False, True):
                kwargs = {"enable_thinking": "thinking" in shown}
                try:
                    ours = template.render(prepared, tools, kwargs, prompt=prompt)
                except DroppedRowError:
                    ours = ""
                try:
                    theirs, _ = render_jinja_template(
                        [prepared], tools, None, template.source, add_generation_prompt=prompt, **kwargs, **named
                    )
                except Exception:
                    theirs = [""]
                assert ours == theirs[0], (name, shown)
                rendered += bool(ours)
    assert rendered > 500


def test_the_base_models_template_renders_as_its_tokenizer_does(
    template: ChatTemplate, random_conversations: list[list[dict[str, Any]]]
) -> None:
    from transformers import AutoTokenizer

    from finemill.models.base.resolve import BUILTIN_MODELS

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny-qwen3"])
    for thinking in (True, False):
        kwargs = {"enable_thinking": thinking}
        ours = [template.render(messages, None, kwargs) for messages in random_conversations]
        assert ours == tokenizer.apply_chat_template(random_conversations, tokenize=False, **kwargs)


def test_thinking_goes_where_the_template_reads_it() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    sources = {
        "{{ message.reasoning_content }}": message,
        "{{ message['thinking'] }}": {"role": "assistant", "content": "4", "thinking": "2+2"},
        "{{ message.content }}": {"role": "assistant", "content": "<think>\n2+2\n</think>\n\n4"},
    }
    for source, expected in sources.items():
        assert ChatTemplate(source, {}, "test").prepare([message]) == [expected]


def test_templates_run_in_a_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", {}, "test")
    with pytest.raises(DroppedRowError, match="template refuses"):
        template.render([{"role": "user", "content": "a"}], None, {})


def test_a_template_refuses_with_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('no system role') }}", {}, "test")
    with pytest.raises(DroppedRowError, match=r"^template refuses: no system role$"):
        template.render([], None, {})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


def test_older_bases_keep_their_template_in_tokenizer_config(base: Path) -> None:
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert load_templates(base, None, {}).default.source == "old"
    (base / "chat_template.jinja").write_text("new")
    assert load_templates(base, None, {}).default.source == "new"


@pytest.mark.parametrize("in_files", [True, False])
def test_rows_with_tools_have_the_template_for_them(base: Path, in_files: bool) -> None:
    if in_files:
        (base / "chat_template.jinja").write_text("plain")
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    else:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    templates = load_templates(base, None, {})
    assert [templates.of(tools).source for tools in (None, [], [{"name": "f"}])] == ["plain", "plain", "tools"]
    assert load_templates(base, None, {}).of([{}]).source == "tools"


def test_a_base_with_other_templates_only_is_an_error(base: Path) -> None:
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "rag", "template": "a"}]}))
    with pytest.raises(UserError, match=r"the base model has no chat template .only rag,"):
        load_templates(base, None, {})


def test_a_base_without_template_is_an_error(base: Path) -> None:
    with pytest.raises(UserError, match="the base model has no chat template"):
        load_templates(base, None, {})


def test_a_template_of_ones_own_replaces_the_bases_and_counts_as_input(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("mine")
    config = ChatFormatConfig(chat_template_path=str(path))
    assert load_templates(base, str(path), {}).default.source == "mine"
    before = template_state({}, config, NOWHERE)
    path.write_text("mine, changed")
    assert template_state({}, config, NOWHERE) != before
    assert template_state({}, ChatFormatConfig(), NOWHERE) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "not found: give a Jinja file"), ("{% for x in %}", "line 1: not a valid chat template")],
)
def test_a_bad_template_of_ones_own_is_named(base: Path, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_templates(base, str(path), {})
    shutil.rmtree(base)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content.encode('ascii', 'x') }}{{ 10 ** 400 * 1.0 }}",
        "{{ '%d' % 'x' }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[0].content.index('zz') }}",
        "{{ {}['x'].y }}",
    ],
)
def test_whatever_a_template_raises_leaves_the_row_out(source: str) -> None:
    with pytest.raises(DroppedRowError, match=r"template (fails|refuses)"):
        ChatTemplate(source, {}, "test").render([{"role": "user", "content": "é"}], None, {})


def test_a_template_without_an_end_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "RENDER_TIMEOUT_S", 0.2)
    rows = "{% for i in range(99999) %}"
    endless = ChatTemplate(f"{rows}{rows}{rows}{{% endfor %}}{{% endfor %}}{{% endfor %}}", {}, "test")
    with pytest.raises(UserError, match=r"needs more than 0\.2 s for one conversation"):
        endless.render([], None, {})
