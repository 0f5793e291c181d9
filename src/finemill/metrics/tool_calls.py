"""Tool calls in an answer, in the notations that chat templates write them in, against the right ones."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemill.rows.answers import after_thinking

# Hermes' and Qwen's, and Mistral's; others write the JSON alone.
_TAGGED = re.compile(r"<(tool_call|function_call)>\s*(?P<call>.*?)\s*(?:</\1>|\Z)", re.DOTALL)
_MARKED = re.compile(r"\[TOOL_CALLS\]\s*(?P<calls>.*)", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s*\n(?P<inside>.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments, None where they are no JSON object."""

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True)
class ToolCallScores:
    """How well the calls of an answer are the right ones, each 0 to 1."""

    names: float
    """F1 of the functions called, each as often as it should be."""
    arguments: float
    """Share of the right calls, of the functions that were called, whose arguments are exactly those."""
    order: float
    """Names in the right order, others between them left out, as a share of the longer list."""
    exact: bool
    """All calls, with their arguments, in order, and no others."""


def read_tool_calls(text: str) -> list[ToolCall]:
    """The calls in `text` after the thinking block, in order; of a broken one its name, if that can be read."""
    text = after_thinking(text)
    tagged = [match["call"] for match in _TAGGED.finditer(text)]
    if tagged:
        return [call for part in tagged for call in _read(part)]
    marked = _MARKED.search(text)
    if marked:
        return list(_read(marked["calls"]))
    fence = _FENCE.fullmatch(text)
    text = (fence["inside"] if fence else text).removeprefix(_PYTHON_TAG).strip()
    return list(_read(text)) if text[:1] in ("{", "[") else []


def score_tool_calls(gold: Sequence[ToolCall], said: Sequence[ToolCall]) -> ToolCallScores:
    """Compare calls; with none on either side all is right."""
    if not gold and not said:
        return ToolCallScores(1.0, 1.0, 1.0, exact=True)
    golds, saids = Counter(call.name for call in gold), Counter(call.name for call in said)
    common = (golds & saids).total()
    left = list(said)
    hits = 0
    for call in gold:
        match = next((other for other in left if _same(call, other)), None)
        if match is not None:
            left.remove(match)
            hits += 1
    longest = _common_subsequence([call.name for call in gold], [call.name for call in said])
    return ToolCallScores(
        names=2 * common / (len(gold) + len(said)),
        arguments=hits / common if common else 0.0,
        order=longest / max(len(gold), len(said)),
        exact=len(gold) == len(said) and all(_same(*pair) for pair in zip(gold, said, strict=True)),
    )


def _read(text: str) -> Iterator[ToolCall]:
    """Calls in JSON text: one object, a list, or several one after another."""
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        start = re.compile(r"[\s;,]*").match(text, position)
        position = start.end() if start else position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            name = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]+)"').match(text, position)
            if name:
                yield ToolCall(name[1], None)
            return
        for item in value if isinstance(value, list) else [value]:
            call = _call_of(item)
            if call:
                yield call


def _call_of(item: Any) -> ToolCall | None:
    """A call from OpenAI's, Hermes' or Llama's object."""
    if not isinstance(item, Mapping):
        return None
    item = item["function"] if isinstance(item.get("function"), Mapping) else item
    name = item.get("name")
    if not isinstance(name, str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    return ToolCall(name, arguments if isinstance(arguments, Mapping) else None)


def _same(gold: ToolCall, said: ToolCall) -> bool:
    return gold.name == said.name and gold.arguments is not None and _same_value(gold.arguments, said.arguments)


def _same_value(gold: Any, said: Any) -> bool:
    """Equality as JSON has it: keys in any order, 1 is 1.0, and true is not 1."""
    if isinstance(gold, bool) or isinstance(said, bool):
        return gold is said
    if isinstance(gold, Mapping) and isinstance(said, Mapping):
        return gold.keys() == said.keys() and all(_same_value(gold[key], said[key]) for key in gold)
    if isinstance(gold, list) and isinstance(said, list):
        return len(gold) == len(said) and all(_same_value(*pair) for pair in zip(gold, said, strict=True))
    return bool(gold == said)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    lengths = [0] * (len(other) + 1)
    for name in one:
        diagonal = 0
        for index, another in enumerate(other, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if name == another else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
