"""One row as it becomes an example: rendered text with spans, then tokens with labels."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.artifacts.messages import Message
from finemill.artifacts.rows import PreparedRow
from finemill.components.chat_format.mask import Turn
from finemill.components.chat_format.tokens import Tokens
from finemill.rows.conversation import Conversation


class Rejected(NamedTuple):
    """A conversation with a worse last answer. `text` may hold `BROKEN`; `spans`, that answer, count without it."""

    text: str
    answer: str
    spans: list[tuple[int, int]]


class Draft(NamedTuple):
    """A rendered row, or the part of its conversation up to one turn.

    `text` may hold `BROKEN`; `spans`, the characters of the `turns` to learn, count without it. `rejected` is the same
    conversation with a worse last answer. `left_out` counts by reason the turns that are not learned. `tokens` are
    those of `text` where they are known.
    """

    record: PreparedRow
    conversation: Conversation
    messages: list[Message]
    kwargs: dict[str, Any]
    text: str
    prompt: str
    completion: str
    rejected: "Rejected | None"
    spans: list[tuple[int, int]]
    turns: tuple[Turn, ...]
    unrolled: bool = False
    left_out: Mapping[str, int] = MappingProxyType({})
    tokens: Tokens | None = None


class Labelled(NamedTuple):
    """Token ids and labels of a conversation, both of shape (T,).

    `num_labels` is how many tokens are learned. `ends` says of each learned span whether its last character's token is
    learned; `truncated`, whether the conversation was cut at the longest length.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    num_labels: int
    ends: list[bool]
    truncated: bool


@dataclass(frozen=True)
class Example:
    """A row as it is trained on and evaluated, and its tokens with the worse answer if it has one."""

    draft: Draft
    chosen: Labelled
    rejected: Labelled | None

    @property
    def input_ids(self) -> list[int]:
        """Token ids, length T."""
        ids: list[int] = self.chosen.input_ids.tolist()
        return ids

    @property
    def labels(self) -> NDArray[np.int32]:
        """Labels, shape (T,)."""
        return self.chosen.labels

    @property
    def end_tokens(self) -> list[str | None]:
        """The end-of-turn token of each learned turn of the assistant, None where none is learned."""
        turns, messages = (
            zip(self.draft.turns, self.chosen.ends, strict=True) if self.draft.turns else (),
            self.messages,
        )
        return [
            turn.end_token if learned else None
            for turn, learned in turns
            if messages[turn.message]["role"] == "assistant"
        ]

    @property
    def truncated(self) -> bool:
        """Whether either conversation was cut."""
        return self.chosen.truncated or (self.rejected is not None and self.rejected.truncated)

    @property
    def messages(self) -> list[Message]:
        """The messages as the template gets them; none for a plain document."""
        return self.draft.messages

    @property
    def num_labels(self) -> int:
        """How many tokens are learned."""
        return self.chosen.num_labels

    @property
    def values(self) -> dict[str, Any]:
        """What is stored of it: values of `DatasetRow` by name, token ids and labels as arrays."""
        draft, worse = self.draft, self.rejected
        # What ends with an earlier turn has not the answer that the label is of.
        desirable = None if draft.unrolled else draft.conversation.desirable
        labels = self.labels
        if desirable is False:
            worse, labels = self.chosen, np.full_like(labels, IGNORE_INDEX)
        return {
            "id": draft.record.id,
            "source": draft.record.source,
            "messages": _json(draft.messages),
            "tools": _json(draft.conversation.tools) if draft.conversation.tools else None,
            "chat_template_kwargs": _json(draft.kwargs),
            "input_ids": self.chosen.input_ids,
            "labels": labels,
            "prompt": draft.prompt,
            "completion": draft.completion,
            "rejected": draft.rejected.answer if draft.rejected else None,
            "rejected_input_ids": worse.input_ids if worse else None,
            "rejected_labels": worse.labels if worse else None,
            "desirable": desirable,
            "answer": draft.conversation.answer,
        }


_json = json.JSONEncoder(ensure_ascii=False).encode
