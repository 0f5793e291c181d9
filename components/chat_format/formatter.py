"""Rows on their way to examples: read, rendered, tokenized, labelled."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.artifacts.messages import Message
from finemill.artifacts.rows import PreparedRow
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.document import (
    begins_rendered_chat,
    cut_document,
    document_text,
    is_rendered_prompt,
)
from finemill.components.chat_format.example import Draft, Example, Labelled, Rejected
from finemill.components.chat_format.mask import Rendered, Turn, label_tokens, render_turns, without_broken
from finemill.components.chat_format.named_templates import CONTROL_TOKENS
from finemill.components.chat_format.template import (
    BROKEN,
    ChatTemplate,
    ChatTemplates,
    NoTemplateError,
    load_templates,
)
from finemill.components.chat_format.tokenize import ChatTokenizer, load_tokenizer
from finemill.components.chat_format.tokens import Tokens
from finemill.components.chat_format.tool_texts import with_tool_texts
from finemill.errors import UserError
from finemill.models.base.unusable import explained_files
from finemill.rows.conversation import Conversation
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import to_conversation
from finemill.rows.thinking import switch_of, thinking_of, with_thinking, without_thinking


def load_formatter(base_model: Path, config: ChatFormatConfig) -> "Formatter":
    """The formatter for a base model's folder. Raises: UserError: it has no tokenizer, or not the template's tokens."""
    name = config.chat_template
    with explained_files("the base model's tokenizer"):
        tokenizer = load_tokenizer(base_model, config.new_tokens)
        if name is not None:
            tokenizer.check_tokens(CONTROL_TOKENS[name], f"chat_template {name}")
        try:
            templates = load_templates(base_model, config.chat_template_path, tokenizer.named_tokens, name)
        except NoTemplateError as error:
            return Formatter(tokenizer, error, config)
        return Formatter(tokenizer, templates, config)


class Formatter:
    """What all rows share: tokenizer, templates, configuration."""

    def __init__(
        self, tokenizer: ChatTokenizer, templates: ChatTemplates | NoTemplateError, config: ChatFormatConfig
    ) -> None:
        for template in templates if isinstance(templates, ChatTemplates) else ():
            tokenizer.add_roles(template.plain_chat)
            tokenizer.add_ends(template.end_of_answer)
        self.tokenizer = tokenizer
        self._templates = templates
        self._config = config

    @property
    def template(self) -> ChatTemplate | None:
        """The base model's template, None where it has none and rows are texts."""
        return self._templates.default if isinstance(self._templates, ChatTemplates) else None

    def drafts(self, record: PreparedRow, row: Mapping[str, Any], *, unroll: bool) -> list[Draft]:
        """Convert and render a row: its whole conversation, with `unroll` also those that end with a rewritten turn.

        Raises: DroppedRowError: it cannot be used. NoTemplateError: it is a conversation, and there is no template.
        """
        conversation = to_conversation(row, record.shape, bad_answers=True)  # data-prep has left out the unwanted ones
        if conversation.text is not None:
            return self._document_drafts(record, conversation, conversation.text)
        if not isinstance(self._templates, ChatTemplates):
            raise self._templates
        template = self._templates.of(conversation.tools)
        conversation = _with_shown_tools(record, conversation, template, self._config)
        chat = _Chat(record, conversation, template, self.tokenizer, self._config)
        return chat.drafts(unroll=unroll)

    def _document_drafts(self, record: PreparedRow, conversation: Conversation, text: str) -> list[Draft]:
        """A document for continued pre-training: everything is learned, the end-of-text token too.

        One longer than `max_length` is several pieces, of which the last ends the text.
        """
        parsed, limit = self._config.rendered_text == "tokens", self._config.max_length
        text = document_text(text, self.tokenizer, read_control_tokens=parsed)
        pieces = [(text, None)] if limit is None else cut_document(text, limit, self.tokenizer)
        drafts = []
        for number, (piece, tokens) in enumerate(pieces):
            own = record if len(pieces) == 1 else replace(record, id=f"{record.id}-{number}")
            plain = piece.replace(BROKEN, "")
            whole = [(0, len(plain))]
            drafts.append(Draft(own, conversation, [], {}, piece, "", plain, None, whole, (), tokens=tokens))
        return drafts

    def finish_all(self, drafts: Sequence[Draft]) -> Iterator[Example | DroppedRowError]:
        """Tokenize and label drafts, in order: an example each, or the reason why it is left out."""
        texts = [draft.text[: self._most_characters] for draft in drafts if draft.tokens is None]
        encoded = iter(self.tokenizer.encode(texts))
        rejected_texts = [draft.rejected.text for draft in drafts if draft.rejected]
        worse = iter(self.tokenizer.encode([text[: self._most_characters] for text in rejected_texts]))
        for draft in drafts:
            tokens = next(encoded) if draft.tokens is None else draft.tokens
            worse_tokens = next(worse) if draft.rejected else None
            try:
                rejected = (
                    self._label(worse_tokens, draft.rejected.text, draft.rejected.spans) if draft.rejected else None
                )
                yield Example(draft, self._label(tokens, draft.text, draft.spans), rejected)
            except DroppedRowError as reason:
                yield reason

    @cached_property
    def _most_characters(self) -> int | None:
        """So many characters are more tokens than the longest length; what follows need not be encoded."""
        limit, longest = self._config.max_length, self.tokenizer.longest_token
        return None if limit is None or longest is None else (limit + 2) * longest

    def _label(self, tokens: Tokens | None, text: str, spans: Sequence[tuple[int, int]]) -> Labelled:
        if tokens is None:
            raise DroppedRowError("control_tokens_in_text")
        spans = tokens.places(text, spans)
        labels = label_tokens(tokens.input_ids, tokens.offsets, spans)
        input_ids, limit = tokens.input_ids, self._config.max_length
        truncated = limit is not None and len(input_ids) > limit
        if truncated:
            if self._config.truncation == "drop":
                more = "more than " if len(text) > (self._most_characters or len(text)) else ""
                raise DroppedRowError("too_long", f"{more}{len(input_ids)} tokens")
            input_ids, labels = input_ids[:limit], labels[:limit]
        num_labels = int(np.count_nonzero(labels != IGNORE_INDEX))
        if not num_labels:
            raise DroppedRowError("too_long" if truncated else "template_removes_thinking")
        last_tokens = np.searchsorted(tokens.offsets[:, 0], [end for _, end in spans]) - 1
        ends = [bool(last < len(labels) and labels[last] != IGNORE_INDEX) for last in last_tokens]
        return Labelled(input_ids, labels, num_labels, ends, truncated)


class _Chat:
    """One conversation under one template."""

    def __init__(
        self,
        record: PreparedRow,
        conversation: Conversation,
        template: ChatTemplate,
        tokenizer: ChatTokenizer,
        config: ChatFormatConfig,
    ) -> None:
        self._record = record
        self._conversation = conversation
        self._template = template
        self._tokenizer = tokenizer
        self._config = config
        self._known_kwargs: dict[int, dict[str, Any]] = {}
        self._messages = self._prepare(conversation.messages)
        self._worse = None if conversation.rejected is None else self._prepare(conversation.rejected)

    def drafts(self, *, unroll: bool) -> list[Draft]:
        """The whole conversation, with `unroll` also those that end with a rewritten turn."""
        if self._conversation.tools and not self._template.takes_tools:
            raise DroppedRowError("template_without_tools", "tools")
        rendered = self._render(self._messages)
        if self._config.learned == "all" and self._worse is None:
            whole = self._draft(self._messages, rendered, rendered.turns)
            spans = [(0, len(rendered.text.replace(BROKEN, "")))]
            return [whole._replace(spans=spans, turns=tuple(rendered.turns[-1:]))]
        in_place, rewritten, left_out = self._sort_turns(self._messages, rendered)
        if isinstance(self._config.learned, tuple) and self._worse is None:
            if "assistant" not in self._config.learned:
                in_place, rewritten, left_out = [], {}, Counter()
            in_place = sorted([*in_place, *rendered.others], key=lambda turn: turn.start)
            if not in_place and "assistant" not in self._config.learned:
                raise DroppedRowError("no_learned_turn")
        whole = self._draft(self._messages, rendered, in_place)
        drafts = [whole._replace(left_out=left_out) if left_out and unroll else whole]
        for end, alone in sorted(rewritten.items()) if unroll else ():
            draft = self._draft(self._messages[: end + 1], alone, alone.turns[-1:])
            record = replace(self._record, id=f"{self._record.id}-{end}")
            conversation = replace(self._conversation, answer=None)
            drafts.append(draft._replace(record=record, conversation=conversation, unrolled=True))
        return drafts

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template takes them. Raises: DroppedRowError: it cannot show them."""
        messages = [self._without_end(message) for message in self._with_system(self._thinking(messages))]
        prepared = self._template.prepare(messages)
        for number, message in enumerate(prepared, start=1):
            written = is_rendered_prompt if message["role"] == "user" else begins_rendered_chat
            if message["role"] != "assistant" and written(message["content"]):
                raise DroppedRowError("rendered_chat", f"turn {number}")
        return prepared

    def _without_end(self, message: Message) -> Message:
        """An answer without the end-of-turn token that some data carry, which the template writes itself."""
        if message["role"] != "assistant":
            return message
        return {**message, "content": self._tokenizer.without_end(message["content"])}

    def _thinking(self, messages: Sequence[Message]) -> list[Message]:
        if self._config.enable_thinking is False:
            return [without_thinking(message) for message in messages]
        if self._config.enable_thinking is True and self._template.opens_thinking:
            return [with_thinking(message) for message in messages]
        return self._obeying(messages) if self._template.takes_enable_thinking else list(messages)

    def _obeying(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in which an answer after `/no_think` has the empty block that the model is to write then.

        Raises: DroppedRowError: a learned answer thinks, or does not, against what its question asks for.
        """
        obeying, asked = [], None
        for number, message in enumerate(messages, start=1):
            if message["role"] == "user":
                asked = switch_of(message["content"])
            elif message["role"] == "assistant" and asked is not None and message.get("weight") != 0:
                thinks = bool(thinking_of(message))
                if thinks != asked and not message.get("tool_calls"):
                    raise DroppedRowError("thinking_switch_disobeyed", f"turn {number}")
                message = message if asked else with_thinking(message)
            obeying.append(message)
        return obeying

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self._config.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system_prompt}, *messages]
        with_tools = bool(self._conversation.tools)
        if messages[0]["role"] != "system" or self._template.takes_system(with_tools=with_tools):
            return messages
        if self._config.unsupported_system == "error":
            raise UserError(
                f"row {self._record.id} of {self._record.source} has a system message, and the chat template takes "
                "none; set unsupported_system to fold or drop, or give another template"
            )
        if self._config.unsupported_system == "drop":
            raise DroppedRowError("template_without_system", "turn 1")
        system, first, *rest = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _sort_turns(
        self, messages: list[Message], rendered: Rendered
    ) -> tuple[list[Turn], dict[int, Rendered], Counter[str]]:
        """The turns to learn where they stand, and the messages that need an example of their own, as they are there.

        A turn may be learned in place if the text up to its end is what the model gets and must produce at that point.
        Returns: both, and how many turns are not learned: those beyond the limit of those that may have an example, and
        those whose thinking the template leaves out wherever they stand.
        """
        in_place = [turn for turn in rendered.turns[-1:] if turn.complete]
        rewritten: dict[int, Rendered] = {}
        left_out = Counter({"template_removes_thinking": len(rendered.turns[-1:]) - len(in_place)})
        if self._config.assistant_turns == "last":
            return in_place, {}, +left_out
        earlier = [turn for turn in rendered.turns[:-1] if messages[turn.message].get("weight") != 0]
        limit = self._config.max_unrolled_turns
        for number, turn in enumerate(_spread(earlier, limit)):
            if len(rewritten) == limit <= number and len(in_place) <= 1:
                # None of the spread ones may be learned where it stands, so that the others are not even rendered.
                left_out["max_unrolled_turns"] += len(earlier) - number
                break
            alone = self._render(messages[: turn.message + 1])
            last = alone.turns[-1]
            if last.complete and rendered.text.startswith(alone.text[: last.end]):
                in_place.append(last)
            elif turn.complete and self._config.rewritten_turns == "in_place":
                in_place.append(turn)
            elif last.complete and self._config.rewritten_turns == "unroll" and self._worse is None:
                if len(rewritten) < limit:
                    rewritten[turn.message] = alone
                else:
                    left_out["max_unrolled_turns"] += 1
            elif not last.complete:
                left_out["template_removes_thinking"] += 1
        return sorted(in_place, key=lambda turn: turn.start), rewritten, +left_out

    def _draft(self, messages: list[Message], rendered: Rendered, learned: Sequence[Turn]) -> Draft:
        return Draft(
            record=self._record,
            conversation=self._conversation,
            messages=messages,
            kwargs=self._kwargs(messages),
            text=rendered.text,
            prompt=rendered.prompt.replace(BROKEN, ""),
            completion=_last_answer(rendered),
            rejected=self._rejected,
            spans=_spans(rendered, learned),
            turns=tuple(learned),
        )

    @cached_property
    def _rejected(self) -> Rejected | None:
        """The conversation with the worse answer, after the same prompt, so with the same variables of the template."""
        if self._worse is None:
            return None
        rendered = self._render(self._worse)
        in_place, _, _ = self._sort_turns(self._worse, rendered)
        return Rejected(rendered.text, _last_answer(rendered), _spans(rendered, in_place))

    def _render(self, messages: list[Message]) -> Rendered:
        broken = self._tokenizer.break_control_tokens(messages)
        tools = self._tokenizer.break_control_tokens(self._conversation.tools)
        kwargs, learned = self._kwargs(messages), self._config.learned
        roles = learned if isinstance(learned, tuple) else ()
        rendered = render_turns(self._template, broken, tools, kwargs, self._tokenizer.control, roles)
        for number, message in enumerate(broken, start=1):
            if message["role"] in ("system", "user") and message["content"].strip() not in rendered.text:
                raise DroppedRowError("template_changes_question", f"turn {number}")
        return rendered

    def _kwargs(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The template's variables for these messages, which are the row's own or the first of them."""
        known = self._known_kwargs.get(len(messages))
        if known is None or self._worse is not None:
            known = self._known_kwargs[len(messages)] = self._make_kwargs(messages)
        return known

    def _make_kwargs(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The same; a row thinks if an answer to its last question does."""
        if not self._template.takes_enable_thinking:
            return self._config.chat_template_kwargs
        thinking = self._config.enable_thinking
        if thinking == "mixed":
            both = (messages,) if self._worse is None else (self._messages, self._worse)
            thinking = any(map(self._thinks, both))
        return {"enable_thinking": thinking, **self._config.chat_template_kwargs}

    def _thinks(self, messages: Sequence[Message]) -> bool:
        asked = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
        if switch_of(messages[asked]["content"]) is not None:
            return True
        return any(self._template.thinking_of(m) for m in messages[asked:] if m["role"] == "assistant")


def _with_shown_tools(
    record: PreparedRow, conversation: Conversation, template: ChatTemplate, config: ChatFormatConfig
) -> Conversation:
    """The conversation with its functions and calls where the template shows them, by `unsupported_tools`."""
    messages, worse = conversation.messages, conversation.rejected
    has_calls = any(m["role"] == "tool" or "tool_calls" in m for m in (*messages, *(worse or ())))
    lacks_calls = has_calls and not template.takes_tool_calls
    lacks_tools = bool(conversation.tools) and not template.takes_tools
    if not (lacks_calls or lacks_tools) or config.unsupported_tools == "drop":
        return conversation
    if config.unsupported_tools == "error":
        raise UserError(
            f"row {record.id} of {record.source} has tools, and the chat template shows none; set unsupported_tools to "
            "fold or drop, or give another template"
        )
    listed = conversation.tools if lacks_tools else None
    return replace(
        conversation,
        messages=with_tool_texts(messages, listed, calls=lacks_calls),
        tools=None if lacks_tools else conversation.tools,
        rejected=None if worse is None else with_tool_texts(worse, listed, calls=lacks_calls),
    )


def _spread(turns: list[Turn], number: int) -> list[Turn]:
    """The same turns, first `number` of them that are evenly spread."""
    if len(turns) <= number:
        return turns
    first = {len(turns) * place // number for place in range(number)}
    return [
        *(turn for place, turn in enumerate(turns) if place in first),
        *(turn for place, turn in enumerate(turns) if place not in first),
    ]


def _spans(rendered: Rendered, learned: Sequence[Turn]) -> list[tuple[int, int]]:
    edges = without_broken(rendered.text, [edge for turn in learned for edge in (turn.start, turn.end)])
    return list(zip(edges[::2], edges[1::2], strict=True))


def _last_answer(rendered: Rendered) -> str:
    turn = rendered.turns[-1]
    return rendered.text[turn.start : turn.end].replace(BROKEN, "")
