"""Functions that a model may call, and calls of them, in the spellings of data sets, as transformers' templates take
them: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from finemill.rows.call_texts import QUOTED_ARGUMENTS, marked_calls, plain_arguments, read_calls
from finemill.rows.reasons import DroppedRowError
from finemill.rows.values import holds_nothing, is_missing, parse_json

Call = dict[str, Any]
Tool = dict[str, Any]

_ARGUMENTS = (
    "arguments",
    "parameters",
    "input",
    "args",
    "kwargs",
    "params",
    "action_input",
    "tool_input",
    "tool_args",
    "function_args",
    "argument",
    "tool_arguments",
    "function_arguments",
    "parameter",
    "inputs",
)
_NAMES = ("name", "function", "tool_name", "tool", "action", "function_name", "api_name")
CALLED = frozenset(_NAMES)
"""Keys under which calls name their function."""
# What a call may hold beside its name and its arguments.
_BESIDE = ("id", "type", "index", "call_id", "tool_call_id", "status", "caller", "object", *_NAMES)
_SCHEMAS = ("parameters", "input_schema", "inputSchema")
_NULLABLE = ("const", "default", "enum", "examples")
# Calls as text: Hermes and Qwen; Glaive; Mistral; Llama 3, with JSON and with a function's name.
_CALL_TEXT = re.compile(
    r"<tool_call>\s*(.*?)\s*</tool_call>|<functioncall>\s*(.*?)\s*(?:</functioncall>|<\|endoftext\|>|\Z)"
    r"|\[TOOL_CALLS\]\s*(\[.*\])\s*\Z|<\|python_tag\|>\s*(\{.*\})\s*(?:<\|eom_id\|>|<\|eot_id\|>|\Z)",
    re.DOTALL,
)
_CALL_MARKS = ("<tool_call>", "<functioncall>", "[TOOL_CALLS]", "<|python_tag|>")
_RESPONSE_TEXT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def to_calls(value: Any) -> list[Call]:
    """One call or a list of them, as objects or JSON text; `arguments` is None where a call says nothing of them.

    Raises: DroppedRowError: no name, or arguments that are no object.
    """
    if isinstance(value, str):
        value = list(_values_in(value))
    if isinstance(value, Mapping) and value and all(str(key).isdecimal() for key in value):
        value = list(value.values())
    return [_call(call) for call in (value if isinstance(value, list) else [value])]


def _values_in(text: str) -> Iterator[Any]:
    """The calls in a text: JSON values one after the other, or within `<tool_call>` tags."""
    for part in ["".join(groups) for groups in _CALL_TEXT.findall(text)] or [text.strip()]:
        value = parse_json(QUOTED_ARGUMENTS.sub(plain_arguments, part) if "'" in part else part)
        if isinstance(value, list):
            yield from value
        elif isinstance(value, Mapping):
            yield value
        else:
            yield from _one_by_one(part)


def _one_by_one(text: str) -> Iterator[Any]:
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            raise DroppedRowError("bad_tool_call", "tool_calls") from None
        yield value
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,;"))


def are_calls(value: Any) -> bool:
    """Whether a value is a list of calls with names and arguments, or JSON text of one."""
    calls = parse_json(value)
    return (
        isinstance(calls, list)
        and bool(calls)
        and all(
            isinstance(call, Mapping) and isinstance(call.get("name"), str) and any(key in call for key in _ARGUMENTS)
            for call in map(parse_json, calls)
        )
    )


def _call(value: Any) -> Call:
    call = parse_json(value)
    if not isinstance(call, Mapping):
        raise DroppedRowError("bad_tool_call", "tool_calls")
    nested = parse_json(call.get("function"))
    function = nested if isinstance(nested, Mapping) else call
    name = next((function[key] for key in _NAMES if isinstance(function.get(key), str)), None)
    alone = next(iter(function)) if name is None and len(function) == 1 else None
    if isinstance(alone, str) and alone not in (*_ARGUMENTS, *_BESIDE) and isinstance(function[alone], Mapping):
        # `{"get_rate": {"to": "EUR"}}`
        name, arguments = alone, function[alone]
    else:
        arguments = _arguments({**call, **function} if function is nested else function)
    if not name:
        raise DroppedRowError("bad_tool_call", "tool_calls")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
    return {
        **kept,
        "type": "function",
        "function": {"name": name, "arguments": None if arguments is None else dict(arguments)},
    }


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments of a call, None where it says nothing of them.

    Raises: DroppedRowError: they are no object, or may stand under a name that is not known.
    """
    key = next((key for key in _ARGUMENTS if not is_missing(function.get(key))), None)
    if key is None:
        if any(name not in (*_BESIDE, *_ARGUMENTS) and not is_missing(value) for name, value in function.items()):
            raise DroppedRowError("bad_tool_call", "tool_calls")
        return {} if any(name in function for name in _ARGUMENTS) else None
    arguments = parse_json(function[key])
    if isinstance(arguments, list) and all(isinstance(a, Mapping) and {"name", "value"} == set(a) for a in arguments):
        arguments = {argument["name"]: argument["value"] for argument in arguments}
    if not isinstance(arguments, Mapping):
        raise DroppedRowError("bad_tool_call", "tool_calls")
    return arguments


def check_call(call: Call, tools: list[Tool] | None) -> Call:
    """A call with its arguments settled by what the function declares.

    Null arguments that it does not declare, or declares with a type that is never null, are left out: Arrow's tables
    give every call the keys of all others. A call without arguments stays only if the function needs none.
    Raises: DroppedRowError: arguments are missing.
    """
    function = call["function"]
    declared = next((t["function"] for t in tools or () if t["function"].get("name") == function["name"]), None)
    schema = declared.get("parameters") if declared else None
    schema = schema if isinstance(schema, Mapping) else {}
    arguments = function["arguments"]
    if isinstance(schema.get("properties"), Mapping):
        arguments = _without_undeclared_nulls(arguments or {}, schema)
    if not arguments and (schema.get("required") or (arguments is None and declared is None)):
        raise DroppedRowError("bad_tool_call", "tool_calls")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def _without_undeclared_nulls(value: Any, schema: Any) -> Any:
    """A value without keys that are null and that its schema does not let be null, at any depth."""
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, list):
        return [_without_undeclared_nulls(item, schema.get("items")) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, Mapping) or not isinstance(properties, Mapping):
        return value
    return {
        key: _without_undeclared_nulls(item, properties.get(key))
        for key, item in value.items()
        if item is not None or _may_be_null(properties.get(key))
    }


def _may_be_null(schema: Any) -> bool:
    """Whether a JSON schema of a value lets it be null; one that names no type does."""
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    return kinds is None or schema.get("nullable") is True or "null" in (kinds if isinstance(kinds, list) else [kinds])


def to_tools(value: Any) -> list[Tool] | None:
    """Function descriptions, as objects or JSON text, each `{"type": "function", "function": ...}`; None for none.

    Raises: DroppedRowError: no list, or a description without name.
    """
    if holds_nothing(value) or str(value).strip().lower() in ("none", "null"):
        return None
    tools = parse_json(value)
    if isinstance(tools, Mapping):
        tools = next((tools[key] for key in ("tools", "functions") if isinstance(tools.get(key), list)), [tools])
    if not isinstance(tools, list):
        raise DroppedRowError("bad_tools", "tools")
    return [_tool(tool) for given in tools for tool in _tools_in(parse_json(given))] or None


def _tools_in(tool: Any) -> list[Any]:
    """The descriptions in one entry: Gemini's holds a list of them, Bedrock's wraps each."""
    if not isinstance(tool, Mapping):
        return [tool]
    declared = parse_json(next((tool[k] for k in ("functionDeclarations", "function_declarations") if k in tool), None))
    if isinstance(declared, list):
        return [parse_json(one) for one in declared]
    spec = tool.get("toolSpec")
    if not isinstance(spec, Mapping):
        return [tool]
    schema = spec.get("inputSchema")
    inner = schema["json"] if isinstance(schema, Mapping) and "json" in schema else schema
    return [{**{key: value for key, value in spec.items() if key != "inputSchema"}, "parameters": inner or {}}]


def _tool(tool: Any) -> Tool:
    if not isinstance(tool, Mapping):
        raise DroppedRowError("bad_tools", "tools")
    nested = parse_json(tool.get("function"))
    function = dict(nested if isinstance(nested, Mapping) else tool)
    if not isinstance(function.get("name"), str):
        raise DroppedRowError("bad_tools", "tools")
    if not isinstance(nested, Mapping):
        function.pop("type", None)
        outer = {"type": "function"}
    else:
        outer = {"type": "function", **{key: value for key, value in tool.items() if key != "function"}}
    schema = next((key for key in _SCHEMAS if key in function), None)
    if schema is not None:
        function["parameters"] = _without_nulls(parse_json(function.pop(schema)))
    return {**outer, "function": function}


def _without_nulls(schema: Any) -> Any:
    """A JSON schema without keys that are null, which Arrow's tables put there; null is a value in few places."""
    if isinstance(schema, list):
        return [_without_nulls(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in _NULLABLE else _without_nulls(value)
        for key, value in schema.items()
        if value is not None or key in _NULLABLE
    }


def has_call_text(content: str) -> bool:
    """Whether an answer holds calls as text, in the way of any family."""
    marked = any(mark in content for mark in _CALL_MARKS) and _CALL_TEXT.search(content) is not None
    return marked or bool(read_calls(content))


def split_call_text(content: str) -> tuple[str, list[Call]]:
    """The text before the calls in an answer, and the calls. Raises: DroppedRowError: they are no calls."""
    if "<" not in content and "[" not in content:
        return content, []
    first = _CALL_TEXT.search(content)
    if first is None:
        before, marked = marked_calls(content) or (content, [])
        return before, [check_call(_call({"name": c.name, "arguments": c.arguments}), None) for c in marked]
    if _CALL_TEXT.sub("", content[first.start() :]).strip():
        raise DroppedRowError("bad_tool_call", "tool_calls")
    return content[: first.start()].rstrip(), [check_call(call, None) for call in to_calls(content[first.start() :])]


def split_response_text(content: str) -> list[str]:
    """The results in a tool's turn: what stands within `<tool_response>` tags, or the whole turn."""
    results = _RESPONSE_TEXT.findall(content)
    return results if results and not _RESPONSE_TEXT.sub("", content) else [content]
