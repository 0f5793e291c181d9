"""Tool calls as the chat templates of each model family write them: JSON in tags, XML, Python, and channels."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Hermes' and Qwen's, Nemotron's, Granite's, Phi's, Llama's, Mistral's, Command R's, Functionary's.
_JSON_MARK = re.compile(
    r"<(?:tool_call|function_call|functioncall|TOOLCALL)>|<\|tool_call(?:_start)?\|>|\[TOOL_CALLS\]|<\|python_(?:tag|start)\|>"
    r"|<\|START_ACTION\|>|\bfunctools(?=\[)"
)
# `[TOOL_CALLS]name[ARGS]{...}`, Kimi's, DeepSeek's, gpt-oss's, Llama's: a name and then its arguments.
_NAMED_MARK = re.compile(
    r"\[TOOL_CALLS\]\s*(?P<mistral>[\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?(?=\s*\{)"
    r"|(?<![\w.-])(?:functions\.)?(?P<kimi>[\w.-]+):\d+\s*<\|tool_call_argument_begin\|>"
    "|(?:<\uff5ctool\u2581call\u2581begin\uff5c>)(?:function)?(?:<\uff5ctool\u2581sep\uff5c>)?(?P<deepseek>[\\w.-]+)"
    "(?:<\uff5ctool\u2581sep\uff5c>|\\s*```json)"
    r"|to=functions\.(?P<gpt_oss>[\w.-]+)[^{]*?<\|message\|>"
    r"|<function=(?P<llama>[\w.-]+)>(?=\s*\{)"
    r"|\bAction:\s*(?P<react>[\w.-]+)\s*\n\s*Action Input:"
)
# Qwen3-Coder's and Seed's; MiniMax's; GLM's.
_XML_CALLS: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = (
    (
        re.compile(r"<function=(?P<name>[\w.-]+)>(?P<body>(?!\s*\{).*?)(?:</function>|\Z)", re.DOTALL),
        re.compile(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL),
    ),
    (
        re.compile(r"<invoke name=\"(?P<name>[^\"]+)\">(?P<body>.*?)(?:</invoke>|\Z)", re.DOTALL),
        re.compile(r"<parameter name=\"(?P<key>[^\"]+)\"[^>]*>(?P<value>.*?)</parameter>", re.DOTALL),
    ),
    (
        re.compile(r"<tool_call>\s*(?P<name>[\w.-]+)\s*(?P<body>(?:<arg_key>.*?)?)(?:</tool_call>|\Z)", re.DOTALL),
        re.compile(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL),
    ),
)
# FunctionGemma's and Gemma 4's, and what texts stand between in them.
_GEMMA_CALL = re.compile(
    r"(?:<start_function_call>|<\|tool_call>)\s*call:(?P<name>[\w.-]+)(?P<body>\{.*?\})"
    r"\s*(?:<end_function_call>|<tool_call\|>|\Z)",
    re.DOTALL,
)
_GEMMA_TEXT = re.compile(r"<escape>|<\|\"\|>")
_BARE_KEY = re.compile(r"(?<=[{,])\s*([^\s{},:]+)\s*:")
_FENCE = re.compile(r"```(?:json|python|tool_code|tool_call|tool_calls)?[ \t]*\n(?P<inside>.*?)\n?[ \t]*```", re.DOTALL)
# What stands before the first call, and what closes calls.
_OPENING = re.compile("(?:<\uff5ctool\u2581calls\u2581begin\uff5c>\\s*|<\\|tool_calls_section_begin\\|>\\s*)\\Z")
_CLOSING = re.compile(
    "(?:\\s|</function>|</tool_call>|</function_call>|</TOOLCALL>|</s>|<\\|/tool_call\\|>|<\\|tool_call_end\\|>|<\\|END_ACTION\\|>"
    "|<\\|eo[tm]_id\\|>"
    "|<\\|im_end\\|>|<\\|end_of_text\\|>|<\uff5ctool\u2581calls?\u2581end\uff5c>|<\uff5cend\u2581of\u2581sentence\uff5c>"
    "|<\\|tool_call(?:s_section)?_end\\|>)+\\Z"
)
_NAME = re.compile(r"""\s*\{\s*["']name["']\s*:\s*["']([^"']+)["']""")
# Glaive's arguments are JSON between single quotes, which no JSON has.
QUOTED_ARGUMENTS = re.compile(r"(\"arguments\":\s*)'(.*)'(\s*\}\s*)\Z", re.DOTALL)
# Of a list that is no Python, cut or with arguments that have no names; without brackets it is as often a formula.
_BROKEN_LIST = re.compile(r"\s*\[\s*([A-Za-z_][\w.]*)\((?=\s*\w+\s*=|[^()]*\)\]\s*\Z)")
# As JSON and JavaScript spell them.
_CONSTANTS = {"true": True, "false": False, "null": None}
_GAP = re.compile(r"[\s;,]*")
_NAMES = ("name", "tool_name", "tool", "function", "action")
_NESTED = ("function", "functionCall", "function_call")
_BESIDE = frozenset(("name", "type", "id", "index", "tool_call_id"))
"""Keys of a call without arguments; an object with a name and others is no call."""
_ARGUMENTS = ("arguments", "parameters", "args", "input", "action_input", "tool_input", "tool_args", "kwargs", "params")


class Untyped(str):
    """An argument in XML, which says no type: `3` may be a number or a text."""

    __slots__ = ()


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments, None where they are no JSON object."""

    name: str
    arguments: Mapping[str, Any] | None


def read_calls(text: str) -> list[ToolCall]:
    """The calls in `text`, which has no thinking, in order; of a broken one its name, if that can be read."""
    readers: tuple[Callable[[str], list[ToolCall]], ...] = (
        _marked,
        _gemma,
        _xml,
        _named,
        _whole,
        _fenced,
        _at_line_start,
    )
    return next((calls for reader in readers if (calls := reader(text))), [])


def marked_calls(text: str) -> tuple[str, list[ToolCall]] | None:
    """The text before calls that special marks announce, and these; None where there are none, or not only them after
    the first mark.
    """
    marks = [match for pattern in (_JSON_MARK, _NAMED_MARK) if (match := pattern.search(text))]
    first = min(marks, key=lambda match: match.start(), default=None)
    if first is None or first.groupdict().get("react"):
        return None
    opening = _OPENING.search(text[: first.start()])
    start = opening.start() if opening else first.start()
    calls = _named(text[start:]) or _marked(text[start:])
    ends = _CLOSING.sub("", text).rstrip().endswith(("}", "]", "```"))
    return (text[:start].rstrip(), calls) if ends and all(call.arguments is not None for call in calls) else None


def _xml(text: str) -> list[ToolCall]:
    # DeepSeek's own name in each of its tags.
    text = text.replace("\uff5cDSML\uff5c", "")
    for call, parameter in _XML_CALLS:
        found = [
            ToolCall(
                match["name"],
                {one["key"].strip(): Untyped(one["value"]) for one in parameter.finditer(match["body"])},
            )
            for match in call.finditer(text)
        ]
        if found:
            return found
    return []


def _gemma(text: str) -> list[ToolCall]:
    """`<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>`: texts between marks."""
    found = []
    for match in _GEMMA_CALL.finditer(text):
        parts = _GEMMA_TEXT.split(match["body"])
        parts[::2] = [_BARE_KEY.sub(r'"\1":', part) for part in parts[::2]]
        parts[1::2] = map(json.dumps, parts[1::2])
        value, _ = _decode("".join(parts), 0)
        found.append(ToolCall(match["name"], _object(value)))
    return found


def _named(text: str) -> list[ToolCall]:
    found = []
    for match in _NAMED_MARK.finditer(text):
        name = next(part for part in match.groups() if part)
        inside = re.compile(r"\s*(?:```json)?\s*").match(text, match.end())
        value, _ = _decode(text, inside.end() if inside else match.end())
        found.append(ToolCall(name, value if isinstance(value, Mapping) else None))
    return found


def _marked(text: str) -> list[ToolCall]:
    found: list[ToolCall] = []
    end = 0
    for mark in _JSON_MARK.finditer(text):
        # A mark inside a call's own argument is text.
        if mark.start() >= end:
            calls, end = _json_calls(text, mark.end())
            found += calls or _python_calls(re.split(r"<[|/]|</s>", text[mark.end() :])[0])
    return found


def _whole(text: str) -> list[ToolCall]:
    if text[:1] in ("{", "["):
        calls, end = _json_calls(text, 0)
        if calls and not text[end:].strip():
            return calls
        if calls and calls[-1].arguments is None:
            return calls
    return _python_calls(text)


def _fenced(text: str) -> list[ToolCall]:
    found: list[ToolCall] = []
    for fence in _FENCE.finditer(text):
        calls, _ = _json_calls(fence["inside"], 0)
        found += calls or _python_calls(fence["inside"])
    return found


def _at_line_start(text: str) -> list[ToolCall]:
    """JSON calls on lines of their own in a text that says more."""
    found: list[ToolCall] = []
    end = 0
    for line in re.finditer(r"^[ \t]*(?=[\[{])", text, re.MULTILINE):
        if line.end() >= end:
            calls, end = _json_calls(text, line.end())
            found += calls
    return found


def _json_calls(text: str, position: int) -> tuple[list[ToolCall], int]:
    """Calls in JSON from `position` on, one object, a list, or several one after another; and where they end."""
    found: list[ToolCall] = []
    while position < len(text):
        gap = _GAP.match(text, position)
        start = gap.end() if gap else position
        if text[start : start + 1] not in ("{", "["):
            break
        value, end = _decode(text, start)
        if end is None and (quoted := QUOTED_ARGUMENTS.sub(plain_arguments, text[start:])) != text[start:]:
            value, end = _decode(quoted, 0)
            end = None if end is None else len(text)
        if end is None:
            name = _NAME.match(text, start)
            return ([*found, ToolCall(name[1], None)] if name else found), len(text)
        found += _calls_of(value)
        position = end
    return found, position


def plain_arguments(match: re.Match[str]) -> str:
    """A match of `QUOTED_ARGUMENTS` as JSON has it."""
    return f"{match[1]}{json.dumps(match[2])}{match[3]}"


def _decode(text: str, position: int) -> tuple[Any, int | None]:
    """A JSON value at `position` and its end; the end is None where there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError):
        return None, None


def _calls_of(value: Any) -> Iterator[ToolCall]:
    """Calls in OpenAI's, Hermes' or Llama's objects."""
    if isinstance(value, list):
        for item in value:
            yield from _calls_of(item)
        return
    if not isinstance(value, Mapping):
        return
    # OpenAI's messages, Anthropic's, Gemini's.
    several = next((value[key] for key in ("tool_calls", "content", "parts") if isinstance(value.get(key), list)), None)
    if several is not None:
        yield from _calls_of(several)
        return
    nested = next((value[key] for key in _NESTED if isinstance(value.get(key), Mapping)), None)
    item = value if nested is None else nested
    name = next((item[key] for key in _NAMES if isinstance(item.get(key), str)), None)
    if name is None or (not any(key in item for key in _ARGUMENTS) and not item.keys() <= _BESIDE):
        return
    arguments: Any = next((item[key] for key in _ARGUMENTS if key in item), {})
    if isinstance(arguments, str):
        arguments = _decode(arguments.strip(), 0)[0]
    name = name.removeprefix("functions.")
    yield ToolCall(name, {} if arguments is None and "arguments" in item else _object(arguments))


def _object(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _python_calls(text: str) -> list[ToolCall]:
    """Calls as Llama 3.2, Llama 4 and LFM2 write them: `[weather(city="Paris"), time()]`, or one of them alone."""
    if not re.match(r"\s*\[?\s*[A-Za-z_][\w.]*\(", text):
        return []
    try:
        return [_python_call(item) for line in ast.parse(text.strip()).body for item in _called(line)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        broken = _BROKEN_LIST.match(text)
        return [ToolCall(broken[1], None)] if broken else []


def _called(line: ast.stmt) -> Sequence[ast.expr]:
    """Raises: ValueError: a line that is more than calls."""
    if not isinstance(line, ast.Expr):
        raise ValueError("no call")
    expression = line.value
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "print" and expression.args:
        # As Gemma writes a call in a block of code.
        expression = expression.args[0]
    return expression.elts if isinstance(expression, ast.List) else [expression]


def _python_call(node: ast.expr) -> ToolCall:
    """Raises: ValueError: `node` is no call of a name with constants by name."""
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise ValueError("no call with arguments by name")
    return ToolCall(ast.unparse(node.func), {str(word.arg): _constant(word.value) for word in node.keywords})


def _constant(node: ast.expr) -> Any:
    """A value as JSON has it. Raises: ValueError: it is no constant."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _constant(item) for key, item in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)
