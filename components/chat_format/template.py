"""The base model's chat template, rendered as transformers renders it, and rendered with marks around every turn.

The marked rendering is what labels are made from, without `{% generation %}` markers in the template and without
guessing from texts: the template's syntax tree gets one more output at the start of each loop over messages. Taking the
marks out gives the plain rendering again: of a template that keeps a part of its text, to print or to look at later,
that is checked for every row.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from finemill.artifacts.messages import Message
from finemill.components.chat_format.environment import chat_environment
from finemill.components.chat_format.limit import OutOfTimeError, time_limit
from finemill.components.chat_format.named_templates import CONTROL_TOKENS, TemplateName, read_named_template
from finemill.components.chat_format.skeleton import Skeletons, notes_texts
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.rows.thinking import split_thinking
from finemill.rows.tools import split_call_text, split_response_text
from finemill.tracking.settings import Tracking

RENDER_TIMEOUT_S = 10.0
"""Seconds in which a template has to render one conversation: an endless one ends the step."""
_ROW_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
BROKEN = "\ufdd2"
"""Stands within a control token that is text, and is taken out once it is encoded."""
NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")
# Blocks whose text a template gets as a value, marks in it.
_KEEPING_BLOCKS = (nodes.AssignBlock, nodes.FilterBlock, nodes.Macro, nodes.CallBlock)
# The names under which templates read a message's thinking block.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_PROBE_CHAT: list[Message] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
_PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


class ChatTemplate:
    """A chat template with the variables that a tokenizer gives it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        self.source = source
        self._marking = marking = chat_environment(marks_turns=True)
        self._variables = {**marking.globals, **special_tokens}
        try:
            self._plain = chat_environment(marks_turns=False).from_string(source)
            tree = marking.parse(source)
            self._skeletons = Skeletons() if notes_texts(tree) else None
            tree = _mark_loops(tree)
            self.keeps_text = any(next(block.find_all(nodes.For), None) for block in tree.find_all(_KEEPING_BLOCKS))
            self._marked = jinja2.Template.from_code(marking, marking.compile(tree), {})
            # Globals are given with the variables, which is quicker.
            self._plain.globals = {}
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where}, line {error.lineno}: not a valid chat template ({error.message})") from None

    @cached_property
    def takes_enable_thinking(self) -> bool:
        """Whether the template knows the variable `enable_thinking`."""
        return "enable_thinking" in self.source

    @cached_property
    def reasoning_field(self) -> str | None:
        """The message key from which the template reads a thinking block, None if it expects it in the content."""
        quoted = (rf"""(?:\.|["']){field}\b""" for field in _REASONING_FIELDS)
        found = (field for field, form in zip(_REASONING_FIELDS, quoted, strict=True) if re.search(form, self.source))
        return next(found, None)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template tells the model which tools there are."""
        return re.search(r"\btools\b", self.source) is not None

    @cached_property
    def plain_chat(self) -> str:
        """A question, its answer and a generation prompt, one letter each: what the template itself writes."""
        try:
            return self.render(_PROBE_CHAT, None, {}) + self.render(_PROBE_CHAT[:1], None, {}, prompt=True)
        except DroppedRowError:
            return ""

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the generation prompt ends with `<think>`, as DeepSeek R1's does."""
        return self.plain_chat.rstrip().endswith("<think>")

    @cached_property
    def end_of_answer(self) -> str:
        """What the template writes after the last answer."""
        try:
            return self.render(_PROBE_CHAT, None, {}).rpartition("a")[2]
        except DroppedRowError:
            return ""

    def takes_system(self, *, with_tools: bool) -> bool:
        """Whether the template shows a system message to the model; some do but for rows with tools."""
        return self._takes_system_with_tools if with_tools else self._takes_system

    @cached_property
    def _takes_system(self) -> bool:
        # One that refuses the question alone, too, says nothing about system messages.
        return bool(self._shows_system(_PROBE_CHAT[:1], None)) or not self.plain_chat

    @cached_property
    def _takes_system_with_tools(self) -> bool:
        """Mistral's shows it with a question, and no longer once a result follows."""
        result = _probe_call({})[:-1]
        shown = [self._shows_system(messages, [_PROBE_TOOL]) for messages in (_PROBE_CHAT[:1], result)]
        return self._takes_system and False not in shown

    def _shows_system(self, messages: list[Message], tools: Any) -> bool | None:
        """Whether a prompt shows a system message before these, None if the template refuses them."""
        system = {"role": "system", "content": "a system message"}
        try:
            return system["content"] in self.render([system, *messages], tools, {}, prompt=True)
        except DroppedRowError:
            return None

    @cached_property
    def takes_tool_calls(self) -> bool:
        """Whether the template reads `tool_calls`."""
        return "tool_calls" in self.source

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether the template shows the arguments of a call only if they are JSON text."""
        arguments = {"probe": "value"}
        shown = [self._shows_arguments(value) for value in (arguments, json.dumps(arguments))]
        return shown == [False, True]

    def _shows_arguments(self, arguments: Any) -> bool:
        try:
            return "probe" in (text := self.render(_probe_call(arguments), [_PROBE_TOOL], {})) and repr(
                arguments
            ) not in text.replace(json.dumps(arguments), "")
        except DroppedRowError:
            return False

    def prepare(self, messages: Iterable[Message]) -> list[Message]:
        """Messages with thinking blocks and calls where the template looks for them."""
        messages = [self._prepare(message) for message in messages]
        return self._prepare_calls(messages) if self.takes_tool_calls else messages

    def _prepare_calls(self, messages: list[Message]) -> list[Message]:
        prepared: list[Message] = []
        for message in messages:
            if message["role"] == "assistant" and "tool_calls" not in message:
                message = _with_read_calls(message)
            if message["role"] == "tool":
                prepared += [{**message, "content": text} for text in split_response_text(message["content"])]
            elif self.takes_text_arguments and "tool_calls" in message:
                prepared.append({**message, "tool_calls": [_with_text_arguments(c) for c in message["tool_calls"]]})
            else:
                prepared.append(message)
        return prepared

    def _prepare(self, message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        reasoning, content = message.get("reasoning_content"), message["content"]
        if self.reasoning_field is None:
            block = "" if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n"
            return {**rest, "content": f"{block}{content}"}
        if reasoning is None:
            reasoning, content = split_thinking(content)
        if reasoning is None and "</think>" in content:
            # Without the field such templates take what stands before a mentioned `</think>` for thinking.
            reasoning = ""
        return {**rest, "content": content, **({} if reasoning is None else {self.reasoning_field: reasoning})}

    def thinking_of(self, message: Message) -> str | None:
        """The thinking block of a prepared assistant message, None if it has none."""
        if self.reasoning_field is None:
            return split_thinking(message["content"])[0]
        reasoning: str | None = message.get(self.reasoning_field)
        return reasoning

    def render(self, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], *, prompt: bool = False) -> str:
        """The conversation's text, with `prompt` up to where the next assistant turn begins.

        Raises: DroppedRowError: the template refuses the conversation.
        """
        return self._render(self._plain, messages, tools, kwargs, prompt)

    def render_marked(
        self, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], *, prompt: bool = False
    ) -> str:
        """The same with `MARK_OPEN <index> MARK_CLOSE` before each message and marks around generation blocks."""
        self._marking.numbers = {id(message): number for number, message in enumerate(messages)}
        return self._render(self._marked, messages, tools, kwargs, prompt)

    def render_from_skeleton(
        self, messages: list[Message], tools: Any, kwargs: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        """The marked text and the prompt before the last message, None where they have to be rendered."""
        if self._skeletons is None or tools is not None:
            return None
        return self._skeletons.fill(messages, kwargs)

    def learn_skeleton(
        self, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], rendered: tuple[str, str]
    ) -> None:
        """Make the skeleton for conversations like this one, whose marked text and prompt are known."""

        def render(recorded: list[Message]) -> tuple[str, str]:
            marked = self.render_marked(recorded, None, kwargs)
            return marked, self.render(recorded[:-1], None, kwargs, prompt=True)

        if self._skeletons is not None and tools is None:
            self._skeletons.learn(messages, kwargs, rendered, render)

    def _render(
        self, template: jinja2.Template, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], prompt: bool
    ) -> str:
        try:
            given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
            variables = {**self._variables, **kwargs, **given}
            with time_limit(RENDER_TIMEOUT_S):
                return "".join(template.root_render_func(template.new_context(variables, shared=True)))
        except jinja2.TemplateError as error:
            raise DroppedRowError(f"template refuses: {str(error)[:80]}") from None
        except OutOfTimeError:
            raise UserError(
                f"the chat template needs more than {RENDER_TIMEOUT_S:g} s for one conversation: choose another with "
                "chat_template_path"
            ) from None
        except _ROW_ERRORS as error:
            # Templates that join None or an object with text, divide or look up what this row does not have.
            raise DroppedRowError(f"template fails: {str(error)[:80] or type(error).__name__}") from None


def _probe_call(arguments: Any) -> list[Message]:
    """A question, a call, its result, an answer."""
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": "call00000", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]


def _with_read_calls(message: Message) -> Message:
    """Calls that stand in the content as `tool_calls`; a content that only looks like calls stays text."""
    try:
        content, calls = split_call_text(message["content"])
    except DroppedRowError:
        return message
    return {**message, "content": content, "tool_calls": calls} if calls else message


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


@dataclass(frozen=True)
class ChatTemplates:
    """A base model's chat template, and the one for rows with tools if that is another."""

    default: ChatTemplate
    tool_use: ChatTemplate | None = None

    def of(self, tools: Any) -> ChatTemplate:
        """The template of a row with these tools, chosen as `apply_chat_template` does."""
        return self.tool_use if tools and self.tool_use is not None else self.default

    def __iter__(self) -> Iterator[ChatTemplate]:
        return iter((self.default,) if self.tool_use is None else (self.default, self.tool_use))


class NoTemplateError(UserError):
    """A base model without a chat template, which rows that are texts do not need."""


def load_templates(
    base_dir: Path, path: str | None, special_tokens: Mapping[str, str], name: TemplateName | None = None
) -> ChatTemplates:
    """The template in `path`, the one of that name, or the base model's own.

    Raises: UserError: there is none, or it is not valid. NoTemplateError: the base has none.
    """
    if name is not None:
        return ChatTemplates(ChatTemplate(read_named_template(name), special_tokens, f"chat_template {name}"))
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"chat_template_path '{path}' not found: give a Jinja file")
        return ChatTemplates(ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, path))
    sources, where = _base_sources(base_dir)
    if "default" not in sources:
        named = f"only {', '.join(sorted(sources))}" if sources else "no chat_template.jinja"
        raise NoTemplateError(
            f"the base model has no chat template ({named}, none in tokenizer_config.json): set chat_template to a "
            f"name ({', '.join(CONTROL_TOKENS)}) or chat_template_path to a Jinja file, or take a base that was "
            "trained for chat"
        )
    tool_use = sources.get("tool_use")
    return ChatTemplates(
        ChatTemplate(sources["default"], special_tokens, where),
        None if tool_use is None else ChatTemplate(tool_use, special_tokens, f"{where}, tool_use"),
    )


def _base_sources(base_dir: Path) -> tuple[dict[str, str], str]:
    """A base model's templates by name, and where they stand: in files of their own, or in tokenizer_config.json."""
    more = {file.stem: file for file in sorted((base_dir / "additional_chat_templates").glob("*.jinja"))}
    files = {"default": base_dir / "chat_template.jinja", **more}
    if files["default"].is_file():
        return {
            name: file.read_text(encoding="utf-8") for name, file in files.items()
        }, "the base model's chat_template.jinja"
    config_file = base_dir / "tokenizer_config.json"
    source = json.loads(config_file.read_bytes()).get("chat_template") if config_file.is_file() else None
    where = "the chat template in the base model's tokenizer_config.json"
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}, where
    return ({"default": source} if isinstance(source, str) else {}), where


def template_state(inputs: Mapping[str, str], config: Any, tracking: Tracking) -> dict[str, str]:
    """What the step's output depends on outside of the store: the file `chat_template_path`."""
    from finemill.artifacts.manifest import sha256_file

    path = config.chat_template_path
    if path is None or not os.path.isfile(os.path.expanduser(path)):
        return {}
    return {"chat_template_path": sha256_file(Path(path).expanduser())}


def _mark_loops(tree: nodes.Template) -> nodes.Template:
    """Put `{{ item | mark_turn }}` first in every loop that prints, which prints nothing where no message is."""
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name) and any(_prints(node) for node in loop.body):
            item = nodes.Name(loop.target.name, "load")
            mark = nodes.Filter(item, "mark_turn", [], [], None, None)
            loop.body.insert(0, nodes.Output([mark]))
    tree.set_lineno(1)
    return tree


def _prints(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Output) or next(node.find_all(nodes.Output), None) is not None
