"""Rows inside of other objects, as tools export them: files with a list for each split, the hub's API, annotations."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finemill.rows.values import is_missing, parse_json

Row = dict[str, Any]

_SPLIT = re.compile(r"(?:train|training|validation|valid|val|dev|eval|test)(?:[_-]\w+)?", re.IGNORECASE)
# Of a chat that was exported, one branch of its tree.
_TREE = ("mapping", "current_node")


def split_lists(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of rows of a file that has one for each split, `{"train": [...], "test": [...]}`; none for others.

    What describes the data may stand beside them, another list of objects may not.
    """
    lists = {name: rows for name, rows in value.items() if isinstance(rows, list) and any(map(_is_row, rows))}
    whole = all(_SPLIT.fullmatch(name) and all(map(_is_row, rows)) for name, rows in lists.items())
    return lists if whole else {}


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def squad_rows(value: Mapping[str, Any]) -> list[Row]:
    """The questions of SQuAD's own files, each with its paragraph; none for other objects."""
    articles = value.get("data")
    if not isinstance(articles, list) or not all(isinstance(a, Mapping) and "paragraphs" in a for a in articles):
        return []
    return [
        {"context": paragraph.get("context"), **question}
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph.get("qas", ())
    ]


def hub_rows(value: Mapping[str, Any]) -> list[Row]:
    """The rows of an answer of the hub's `/rows`, as they are in it; none for other objects."""
    rows = value.get("rows")
    if not isinstance(rows, list) or "features" not in value:
        return []
    return rows if all(isinstance(row, dict) and "row" in row for row in rows) else []


def unwrapped(row: Row) -> Row | str:
    """The row inside of one that a tool made around it; other rows as they are; why not, if it cannot be had whole."""
    if "row" in row and "row_idx" in row and isinstance(row["row"], dict):
        cut = row.get("truncated_cells")
        return f"the hub's API cut its cells {cut}: fetch the file" if cut else row["row"]
    if isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list):
        return _annotated(row["data"], row["annotations"])
    if all(name in row for name in _TREE) and isinstance(row["mapping"], dict):
        rest = {name: value for name, value in row.items() if name not in _TREE}
        return {"messages": list(_branch(row["mapping"], row["current_node"])), **rest}
    return row


def _annotated(data: Row, annotations: list[Any]) -> Row | str:
    """A task of Label Studio with what its annotator said by the names of the controls."""
    done = [a for a in annotations if isinstance(a, Mapping) and not a.get("was_cancelled")]
    if annotations and not done:
        return "its annotation was cancelled"
    given = done[0].get("result") if done else None
    results = [result for result in given if isinstance(result, Mapping)] if isinstance(given, list) else []
    if any(a.get("result") != done[0].get("result") for a in done[1:]):
        return f"{len(done)} annotations that differ: export one for each task"
    said = {str(result.get("from_name")): _said(result) for result in results}
    clash = next((name for name in said if not is_missing(data.get(name))), None)
    return f"its annotation is called '{clash}' as one of its fields" if clash else {**data, **said}


def _said(result: Mapping[str, Any]) -> Any:
    """What a control holds: one text, choice, rating or side, or a list of several."""
    value = result.get("value")
    if not isinstance(value, Mapping):
        return value
    held = next((value[name] for name in ("text", "choices", "rating", "selected", "number") if name in value), value)
    held = {"left": "first", "right": "second"}.get(held, held) if isinstance(held, str) else held
    return held[0] if isinstance(held, list) and len(held) == 1 else held


def _branch(nodes: Mapping[str, Any], last: Any) -> Iterator[Row]:
    """The messages of the branch of a ChatGPT export that was shown last, from the first on."""
    branch: list[Row] = []
    seen = set()
    while isinstance(last, str) and isinstance(node := nodes.get(last), Mapping) and last not in seen:
        seen.add(last)
        if isinstance(node.get("message"), Mapping):
            branch.append(_message(node["message"]))
        last = node.get("parent")
    return reversed(branch)


def _message(message: Mapping[str, Any]) -> Row:
    author, content = message.get("author"), message.get("content")
    parts = content.get("parts") if isinstance(content, Mapping) else None
    text = content.get("text") if isinstance(content, Mapping) and parts is None else parts
    role = author.get("role") if isinstance(author, Mapping) else None
    weight = {"weight": message["weight"]} if role == "assistant" and message.get("weight") in (0, 0.0) else {}
    return {"role": role, "content": text if text is not None else parse_json(content), **weight}
