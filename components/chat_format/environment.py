"""The environment that transformers documents for chat templates, with short ways where a sandbox spends its time.

Jinja's sandbox asks of every attribute whether it is safe. Of a message's key, a text's method and a loop's counters
the type says so; everything else goes the whole way.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from types import BuiltinMethodType, MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Unicode noncharacters: never part of text that is interchanged, so they can stand for marks.
MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"
GENERATION_START, GENERATION_END = f"{MARK_OPEN}start{MARK_CLOSE}", f"{MARK_OPEN}end{MARK_CLOSE}"

_OF_OBJECTS = frozenset(dir(dict))
# All but `format` and `format_map`, which reach attributes.
_OF_TEXTS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
_OF_LOOPS = frozenset(("first", "index", "index0", "last", "length", "nextitem", "previtem", "revindex", "revindex0"))


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders as `ImmutableSandboxedEnvironment` does.

    The filter `mark_turn` gives `MARK_OPEN <number> MARK_CLOSE` for the objects whose number by `id` is in `numbers`,
    and nothing for others.
    """

    numbers: Mapping[int, int] = MappingProxyType({})

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item of that name."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _OF_OBJECTS:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif (kind is str and attribute in _OF_TEXTS) or (kind is LoopContext and attribute in _OF_LOOPS):
            return getattr(obj, attribute)
        elif kind is Namespace and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        if called is Namespace or (type(called) is BuiltinMethodType and type(called.__self__) is str):
            kwargs.pop("_block_vars", None)
            kwargs.pop("_loop_vars", None)
            return called(*args, **kwargs)
        return super().call(context, called, *args, **kwargs)


def mark_turn(environment: ChatEnvironment, item: object) -> str:
    """A mark for a message, nothing for any other object."""
    number = environment.numbers.get(id(item))
    return "" if number is None else f"{MARK_OPEN}{number}{MARK_CLOSE}"


class GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model writes, in templates made for training."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block as a call, which gives its body a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_block"), [], [], body).set_lineno(line)

    def _render_block(self, caller: Macro) -> str:
        text: str = caller()
        if self.environment.marks_turns:  # type: ignore[attr-defined]
            return f"{GENERATION_START}{text}{GENERATION_END}"
        return text


def chat_environment(*, marks_turns: bool) -> ChatEnvironment:
    """An environment, with `marks_turns` one that puts marks around generation blocks."""
    environment = ChatEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["mark_turn"] = pass_environment(mark_turn)
    environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
    environment.extend(marks_turns=marks_turns)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
