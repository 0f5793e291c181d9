"""One row on its way to an example: conversation, rendered text with spans, tokens with labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.dataset import IGNORE_INDEX, DatasetRow
from finemill.artifacts.rows import PreparedRow
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.document import document_text, is_rendered_chat
from finemill.components.chat_format.mask import (
    Rendered,
    Turn,
    label_tokens,
    render_turns,
    without_broken,
)
from finemill.components.chat_format.messages import Conversation, Message, to_conversation
from finemill.components.chat_format.template import BROKEN, ChatTemplate
from finemill.components.chat_format.tokenize import ChatTokenizer, Tokens, check_characters
from finemill.rows.reasons import DroppedRowError
from finemill.rows.thinking import thinking_of, with_thinking, without_thinking


@dataclass(frozen=True)
class Rejected:
    """A conversation with a worse last answer. `text` may hold `BROKEN`; `spans`, that answer, count without it."""

    text: str
    answer: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Draft:
    """A rendered row, or the part of its conversation up to one turn.

    `text` may hold `BROKEN`; `spans`, the characters of the `turns` to learn, count without it. `rejected` is the same
    conversation with a worse last answer.
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


@dataclass(frozen=True)
class Labelled:
    """Token ids and labels of a conversation, both of length T.

    `ends` says of each learned span whether its last character's token is learned; `truncated`, whether the
    conversation was cut at the longest length.
    """

    input_ids: list[int]
    labels: NDArray[np.int32]
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
        return self.chosen.input_ids

    @property
    def labels(self) -> NDArray[np.int32]:
        """Labels, shape (T,)."""
        return self.chosen.labels

    @property
    def end_tokens(self) -> list[str | None]:
        """The end-of-turn token of each learned turn, None where none is learned."""
        turns = zip(self.draft.turns, self.chosen.ends, strict=True) if self.draft.turns else ()
        return [turn.end_token if learned else None for turn, learned in turns]

    @property
    def truncated(self) -> bool:
        """Whether either conversation was cut."""
        return self.chosen.truncated or (self.rejected is not None and self.rejected.truncated)

    @property
    def messages(self) -> list[Message]:
        """The messages as the template gets them; none for a plain document."""
        return self.draft.messages

    @cached_property
    def num_labels(self) -> int:
        """How many tokens are learned."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def row(self) -> DatasetRow:
        """What is stored of it."""
        draft, worse = self.draft, self.rejected
        return DatasetRow(
            id=draft.record.id,
            source=draft.record.source,
            messages=_json(draft.messages),
            tools=_json(draft.conversation.tools) if draft.conversation.tools else None,
            chat_template_kwargs=_json(draft.kwargs),
            input_ids=self.input_ids,
            labels=self.labels.tolist(),
            prompt=draft.prompt,
            completion=draft.completion,
            rejected=draft.rejected.answer if draft.rejected else None,
            rejected_input_ids=worse.input_ids if worse else None,
            rejected_labels=worse.labels.tolist() if worse else None,
            answer=draft.conversation.answer,
        )

    @property
    def chat_line(self) -> str:
        """The conversation as a line of JSON; "" for a document, or a part of a conversation."""
        if self.draft.unrolled or not self.messages:
            return ""
        tools = {"tools": self.draft.conversation.tools} if self.draft.conversation.tools else {}
        return _json({"messages": self.messages, **tools}) + "\n"


class Formatter:
    """What all rows share: tokenizer, template, configuration."""

    def __init__(self, tokenizer: ChatTokenizer, template: ChatTemplate, config: ChatFormatConfig) -> None:
        tokenizer.add_roles(template.plain_chat)
        self.tokenizer = tokenizer
        self._template = template
        self._config = config

    def drafts(self, record: PreparedRow, row: Mapping[str, Any], *, unroll: bool) -> list[Draft]:
        """Convert and render a row: its whole conversation, with `unroll` also those that end with a rewritten turn.

        Raises: DroppedRowError: it cannot be used.
        """
        conversation = to_conversation(row, record.shape)
        if conversation.text is not None:
            return [self._draft_text(record, conversation, conversation.text)]
        messages = self._template.prepare(self._with_system(self._thinking(conversation.messages)))
        check_characters(json.dumps([messages, conversation.tools], ensure_ascii=False))
        if any(message["role"] != "assistant" and is_rendered_chat(message["content"]) for message in messages):
            raise DroppedRowError("rendered_chat")
        if conversation.tools and not self._template.takes_tools:
            raise DroppedRowError("template_without_tools")
        rendered = self._render(messages, conversation)
        in_place, rewritten = self._sort_turns(messages, conversation, rendered)
        drafts = [self._draft_chat(record, conversation, messages, rendered, in_place)]
        for end in rewritten if unroll else ():
            part = messages[: end + 1]
            rendered = self._render(part, conversation)
            draft = self._draft_chat(record, replace(conversation, answer=None), part, rendered, rendered.turns[-1:])
            drafts.append(replace(draft, record=replace(record, id=f"{record.id}-{end}"), unrolled=True))
        return drafts

    def _draft_text(self, record: PreparedRow, conversation: Conversation, text: str) -> Draft:
        """A document for continued pre-training: everything is learned, the end-of-text token too."""
        parsed = self._config.rendered_text == "tokens"
        text = document_text(text, self.tokenizer, read_control_tokens=parsed)
        plain = text.replace(BROKEN, "")
        return Draft(record, conversation, [], {}, text, "", plain, None, [(0, len(plain))], ())

    def _sort_turns(
        self, messages: list[Message], conversation: Conversation, rendered: Rendered
    ) -> tuple[list[Turn], list[int]]:
        """The turns to learn where they stand, and the messages that need an example of their own.

        A turn may be learned in place if the text up to its end is what the model gets and must produce at that point.
        """
        in_place = [turn for turn in rendered.turns[-1:] if turn.complete]
        rewritten = []
        if self._config.assistant_turns == "last" or conversation.rejected is not None:
            return in_place, []
        for turn in rendered.turns[:-1]:
            alone = self._render(messages[: turn.message + 1], conversation)
            last = alone.turns[-1]
            if last.complete and rendered.text.startswith(alone.text[: last.end]):
                in_place.append(last)
            elif turn.complete and self._config.rewritten_turns == "in_place":
                in_place.append(turn)
            elif last.complete and self._config.rewritten_turns == "unroll":
                rewritten.append(turn.message)
        return sorted(in_place, key=lambda turn: turn.start), rewritten

    def _draft_chat(
        self,
        record: PreparedRow,
        conversation: Conversation,
        messages: list[Message],
        rendered: Rendered,
        learned: Sequence[Turn],
    ) -> Draft:
        return Draft(
            record=record,
            conversation=conversation,
            messages=messages,
            kwargs=self._kwargs(messages, conversation),
            text=rendered.text,
            prompt=rendered.prompt.replace(BROKEN, ""),
            completion=_last_answer(rendered),
            rejected=self._render_rejected(messages, conversation),
            spans=_spans(rendered, learned),
            turns=tuple(learned),
        )

    def _render(
        self, messages: list[Message], conversation: Conversation, kwargs: dict[str, Any] | None = None
    ) -> Rendered:
        kwargs = self._kwargs(messages, conversation) if kwargs is None else kwargs
        messages, tools = self.tokenizer.break_control_tokens([messages, conversation.tools])
        return render_turns(self._template, messages, tools, kwargs, self.tokenizer.control)

    def _render_rejected(self, messages: list[Message], conversation: Conversation) -> Rejected | None:
        """The worse answer after the same prompt, so with the same variables of the template."""
        if conversation.rejected is None:
            return None
        worse = self._template.prepare(self._thinking([conversation.rejected]))
        check_characters(json.dumps(worse, ensure_ascii=False))
        rendered = self._render([*messages[:-1], *worse], conversation, self._kwargs(messages, conversation))
        return Rejected(rendered.text, _last_answer(rendered), _spans(rendered, rendered.turns[-1:]))

    def _thinking(self, messages: list[Message]) -> list[Message]:
        if self._config.enable_thinking is False:
            return [without_thinking(message) for message in messages]
        if self._config.enable_thinking is True and self._template.opens_thinking:
            return [with_thinking(message) for message in messages]
        return messages

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self._config.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._config.system_prompt}, *messages]

    def _kwargs(self, messages: list[Message], conversation: Conversation) -> dict[str, Any]:
        """The template's variables for this row; a row thinks if an answer to its last question does."""
        if not self._template.takes_enable_thinking:
            return self._config.chat_template_kwargs
        thinking = self._config.enable_thinking
        if thinking == "mixed":
            last_question = max(number for number, message in enumerate(messages) if message["role"] == "user")
            answers = [m for m in messages[last_question:] if m["role"] == "assistant"]
            thinking = any(map(self._template.thinking_of, answers))
            thinking |= bool(conversation.rejected and thinking_of(conversation.rejected))
        return {"enable_thinking": thinking, **self._config.chat_template_kwargs}

    def finish(self, draft: Draft, tokens: Tokens | None, rejected_tokens: Tokens | None) -> Example:
        """Label a row's tokens, and those with its worse answer.

        Raises: DroppedRowError: too long, or nothing in it is learned.
        """
        rejected = self._label(rejected_tokens, draft.rejected.spans) if draft.rejected else None
        return Example(draft, self._label(tokens, draft.spans), rejected)

    def _label(self, tokens: Tokens | None, spans: Sequence[tuple[int, int]]) -> Labelled:
        if tokens is None:
            raise DroppedRowError("control_tokens_in_text")
        labels = label_tokens(tokens.input_ids, tokens.offsets, spans)
        input_ids, limit = tokens.input_ids, self._config.max_length
        truncated = limit is not None and len(input_ids) > limit
        if truncated:
            if self._config.truncation == "drop":
                raise DroppedRowError("too_long")
            input_ids, labels = input_ids[:limit], labels[:limit]
        if (labels == IGNORE_INDEX).all():
            raise DroppedRowError("too_long" if truncated else "template_removes_thinking")
        last_tokens = np.searchsorted(tokens.offsets[:, 0], [end for _, end in spans]) - 1
        ends = [bool(last < len(labels) and labels[last] != IGNORE_INDEX) for last in last_tokens]
        return Labelled(input_ids, labels, ends, truncated)


def _spans(rendered: Rendered, learned: Sequence[Turn]) -> list[tuple[int, int]]:
    edges = without_broken(rendered.text, [edge for turn in learned for edge in (turn.start, turn.end)])
    return list(zip(edges[::2], edges[1::2], strict=True))


def _last_answer(rendered: Rendered) -> str:
    turn = rendered.turns[-1]
    return rendered.text[turn.start : turn.end].replace(BROKEN, "")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
