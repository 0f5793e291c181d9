import json

import pytest

from finemill.metrics.tool_calls import ToolCallScores, read_tool_calls, score_tool_calls
from finemill.rows.call_texts import ToolCall

WEATHER = ToolCall("weather", {"city": "Paris", "days": 2})
TIME = ToolCall("time", {"zone": "CET"})
CALLS = [{"name": call.name, "arguments": call.arguments} for call in (WEATHER, TIME)]
OPENAI = [{"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}} for call in CALLS]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in CALLS),
        f"<think>\nfirst\n</think>\n\nI look.\n<tool_call>\n{json.dumps(CALLS[0])}\n{json.dumps(CALLS[1])}</tool_call>",
        f"[TOOL_CALLS]{json.dumps(CALLS)}",
        "; ".join(json.dumps({"name": call["name"], "parameters": call["arguments"]}) for call in CALLS),
        "<|python_tag|>" + json.dumps(CALLS),
        f"```json\n{json.dumps(CALLS)}\n```",
        json.dumps(OPENAI),
    ],
)
def test_calls_are_read_in_the_notations_of_chat_templates(text: str) -> None:
    assert read_tool_calls(text) == [WEATHER, TIME]


F = ToolCall("f", {"a": 1})
DSML = '<|invoke name="f">\n<|parameter name="a" string="false">1</|parameter>\n</|invoke>'.replace(
    "|", "\uff5cDSML\uff5c"
)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>\n</minimax:tool_call>',
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        '<function=f>{"a": 1}</function>',
        '[TOOL_CALLS]f[ARGS]{"a":1}',
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a":1}<|tool_call_end|>',
        '<\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>f\n```json\n{"a":1}\n```',
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":1}<|call|>',
        'Thought: I call it.\nAction: f\nAction Input: {"a": 1}',
        "[f(a=1)]",
        "<|tool_call_start|>[f(a=1)]<|tool_call_end|>",
        "```tool_code\nf(a=1)\n```",
        'Sure, here is the call:\n{"name":"f","arguments":{"a":1}}',
        '{"tool":"f","args":{"a":1}}',
        '{"role":"assistant","content":[{"type":"text","text":"Yes."},{"type":"tool_use","name":"f","input":{"a":1}}]}',
        '{"parts":[{"functionCall":{"name":"f","args":{"a":1}}}]}',
        """<functioncall> {"name": "f", "arguments": '{"a": 1}'} <|endoftext|>""",
        DSML,
        "<function=f><parameter=a>1.0</parameter></function>",
    ],
)
def test_calls_of_every_family_are_read(text: str) -> None:
    assert score_tool_calls([F], read_tool_calls(text)).exact


def test_a_mark_inside_an_argument_is_text() -> None:
    call = ToolCall("f", {"text": "<tool_call>no</tool_call>"})
    text = f"<tool_call>{json.dumps({'name': call.name, 'arguments': call.arguments})}</tool_call>"
    assert read_tool_calls(text) == [call]


def test_xml_says_no_types_but_a_wrong_value_is_wrong() -> None:
    said = read_tool_calls("<function=f><parameter=a>1</parameter></function>")
    assert score_tool_calls([ToolCall("f", {"a": "1"})], said).exact
    assert not score_tool_calls([ToolCall("f", {"a": 2})], said).exact


@pytest.mark.parametrize(
    "text", ["It is 20 degrees.", "", "<think>\n<tool_call>{}</tool_call>", "{broken", "[1, 2]", "{}", '{"name": 3}']
)
def test_a_text_without_calls_has_none(text: str) -> None:
    assert read_tool_calls(text) == []


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa',
        "<tool_call>{'name': 'weather', 'arguments': {'city': 'Paris'}}</tool_call>",
        '[weather(city="Pa',
        '[weather("Paris")]',
    ],
)
def test_of_a_broken_call_the_name_counts(text: str) -> None:
    assert read_tool_calls(text) == [ToolCall("weather", None)]


@pytest.mark.parametrize(
    "text", ["f(x)", "[see(s) the text]", "[a](https://example.com)", '{"content": [1], "name": "x"}']
)
def test_formulas_links_and_data_are_no_calls(text: str) -> None:
    assert read_tool_calls(text) == []


def test_values_in_python_and_in_xml_are_those_of_json() -> None:
    call = ToolCall("f", {"a": [1, {"b": True}], "c": None})
    for text in (
        '[f(a=(1, {"b": true}), c=null)]',
        '<function=f><parameter=a>[1.0, {"b": true}]</parameter><parameter=c>null</parameter></function>',
    ):
        assert score_tool_calls([call], read_tool_calls(text)).exact
    assert not score_tool_calls(
        [ToolCall("f", {"a": ["1"]})], read_tool_calls("<function=f><parameter=a>[1]</parameter></function>")
    ).exact


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        ([WEATHER, TIME], ToolCallScores(1, 1, 1, exact=True)),
        ([TIME, WEATHER], ToolCallScores(1, 1, 0.5, exact=False)),
        ([WEATHER], ToolCallScores(2 / 3, 1, 0.5, exact=False)),
        ([ToolCall("weather", {"city": "Rome", "days": 2}), TIME], ToolCallScores(1, 0.5, 1, exact=False)),
        ([ToolCall("weather", None), TIME], ToolCallScores(1, 0.5, 1, exact=False)),
        ([WEATHER, TIME, TIME], ToolCallScores(0.8, 1, 2 / 3, exact=False)),
        ([], ToolCallScores(0, 0, 0, exact=False)),
    ],
)
def test_names_arguments_and_order_count_apart(said: list[ToolCall], scores: ToolCallScores) -> None:
    assert score_tool_calls([WEATHER, TIME], said) == scores


def test_a_call_that_nobody_asked_for_is_wrong() -> None:
    assert score_tool_calls([], [TIME]).exact is False
    assert score_tool_calls([], []).exact is True


def test_arguments_are_equal_as_json_is() -> None:
    gold = ToolCall("f", {"a": 1, "b": [True, {"c": None}]})
    assert score_tool_calls([gold], [ToolCall("f", {"b": [True, {"c": None}], "a": 1.0})]).exact
    assert not score_tool_calls([gold], [ToolCall("f", {"a": True, "b": [True, {"c": None}]})]).exact
    assert not score_tool_calls([gold], [ToolCall("f", {"a": 1, "b": [1, {"c": None}]})]).exact
