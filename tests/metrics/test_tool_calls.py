import json

import pytest

from finemill.metrics.tool_calls import ToolCall, ToolCallScores, read_tool_calls, score_tool_calls

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


@pytest.mark.parametrize(
    "text", ["It is 20 degrees.", "", "<think>\n<tool_call>{}</tool_call>", "{broken", "[1, 2]", "{}", '{"name": 3}']
)
def test_a_text_without_calls_has_none(text: str) -> None:
    assert read_tool_calls(text) == []


def test_of_a_broken_call_the_name_counts() -> None:
    assert read_tool_calls('<tool_call>\n{"name": "weather", "arguments": {"city": "Pa') == [ToolCall("weather", None)]


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
