"""The tool calls of an answer against the right ones: names, arguments, order."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemill.rows.answers import after_thinking
from finemill.rows.call_texts import ToolCall, Untyped, read_calls


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
    return read_calls(after_thinking(text))


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


def _same(gold: ToolCall, said: ToolCall) -> bool:
    return gold.name == said.name and gold.arguments is not None and _same_value(gold.arguments, said.arguments)


def _same_value(gold: Any, said: Any) -> bool:
    """Equality as JSON has it: keys in any order, 1 is 1.0, and true is not 1; without types, equality of either."""
    if isinstance(said, Untyped) or isinstance(gold, Untyped):
        return str(gold) == str(said) or _same_value(_typed(gold), _typed(said))
    if isinstance(gold, bool) or isinstance(said, bool):
        return gold is said
    if isinstance(gold, Mapping) and isinstance(said, Mapping):
        return gold.keys() == said.keys() and all(_same_value(gold[key], said[key]) for key in gold)
    if isinstance(gold, list) and isinstance(said, list):
        return len(gold) == len(said) and all(_same_value(*pair) for pair in zip(gold, said, strict=True))
    return bool(gold == said)


def _typed(value: Any) -> Any:
    """The value that an untyped one spells, if it spells one; any other value, and other texts, as they are."""
    if not isinstance(value, Untyped):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(value.lower(), str(value))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    lengths = [0] * (len(other) + 1)
    for name in one:
        diagonal = 0
        for index, another in enumerate(other, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if name == another else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
