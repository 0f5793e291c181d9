"""What stands beside a question and belongs to it: an input, a passage, what was found for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from finemill.rows.reader import Reader
from finemill.rows.speakers import turn_list

CONTEXT_COLUMNS = (
    "input",
    "context",
    "contexts",
    "passage",
    "document",
    "background",
    "schema",
    "article",
    "paragraph",
)
"""Columns of what a question is about."""
FOUND_COLUMNS = (
    *("story", "documents", "passages", "ctxs", "retrieved_documents", "retrieved_contexts", "retrieved_passages"),
    *("knowledge", "support"),
)
"""Columns of what was found for a question, where they hold texts."""

_TEXTS = ("text", "content", "passage", "passage_text", "page_content", "body")
# What self-instruct and others write where there is no input.
_NO_INPUT = ("<noinput>", "noinput", "no input", "n/a", "nan", "none", "null")


def text_beside(row: Reader, names: Sequence[str]) -> str:
    """The text that a question is about, in the first of these columns that holds one."""
    name = row.first(names)
    if name is None:
        found = (n for n in FOUND_COLUMNS if n in row.names)
        name = next((n for n in found if isinstance(row.peek(n), str) or passages_in(row.peek(n))), None)
    if name is None or not row.has(name):
        return ""
    # A list under `input` may be anything.
    passages = [] if name == "input" else passages_in(row.peek(name))
    context = "\n\n".join(passages) or row.text(name)
    row.get(name)
    return "" if context.strip().lower() in _NO_INPUT else context


def passages_in(value: Any) -> list[str]:
    """The texts of passages as retrieval gives them, in a list or by column; none for any other value."""
    if isinstance(value, Mapping):
        return _by_column(value)
    if not isinstance(value, list) or turn_list(value):
        return []
    if all(isinstance(item, Mapping) for item in value):
        texts = [next((item[key] for key in _TEXTS if isinstance(item.get(key), str)), "") for item in value]
        titled = [
            f"{item['title']}\n{text}" if item.get("title") else text for item, text in zip(value, texts, strict=True)
        ]
        return titled if all(texts) else []
    return value if all(isinstance(item, str) for item in value) else []


def _by_column(value: Mapping[str, Any]) -> list[str]:
    """HotpotQA's titles and sentences; PubMedQA's and MS MARCO's lists of texts."""
    titles, sentences = value.get("title"), value.get("sentences")
    if isinstance(titles, list) and isinstance(sentences, list) and len(titles) == len(sentences):
        if all(isinstance(s, list) and all(isinstance(part, str) for part in s) for s in sentences):
            return [f"{title}\n{''.join(parts)}" for title, parts in zip(titles, sentences, strict=True)]
        return []
    texts: list[Any] = next(
        (value[key] for key in ("contexts", "passage_text", "texts") if isinstance(value.get(key), list)), []
    )
    return texts if all(isinstance(text, str) for text in texts) else []
