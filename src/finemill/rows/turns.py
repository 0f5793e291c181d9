"""Turns of a conversation in every spelling as messages: roles system, user, assistant and tool, as transformers'
templates take them.

An assistant message may have `reasoning_content` (its thinking block; one written at the start of the content stays
there), `tool_calls`, and `weight: 0` if it is not to be learned.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.thinking import split_thinking
from finemill.rows.tools import to_calls
from finemill.rows.values import as_text, is_missing, is_true, parse_json

Message = dict[str, Any]

_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_THINKING_ROLES = ("thinking", "reasoning", "thought", "analysis")
_APART = frozenset((*_CALL_ROLES, *_THINKING_ROLES))
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "bard", "bing", "claude"), "assistant"
    ),
    **dict.fromkeys((*_CALL_ROLES, *_THINKING_ROLES), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "function_output", "tool_response", "tool_result", "tool_output"), "tool"),
}
"""The role, as transformers' templates take it, of every name that data sets give a speaker."""

_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
THINKING_KEYS = (
    "reasoning_content",
    "thinking",
    "reasoning",
    "thought",
    "thoughts",
    "cot",
    "chain_of_thought",
    "reasoning_details",
    "thinking_content",
    "reasoning_text",
    "rationale",
)
# Other names that some text of an assistant's turn may have which it is wrong to leave out.
_SOUNDS_LIKE_THINKING = re.compile(
    r"think|thought|reasoning|rationale|scratchpad|monologue|deliberat|(?:\b|_)cot(?:\b|_)", re.IGNORECASE
)
_LEARNED_KEYS = (
    "weight",
    "train",
    "training",
    "trainable",
    "loss",
    "loss_weight",
    "loss_scale",
    "loss_mask",
    "learn",
    "trained",
    "is_trained",
    "train_on_turn",
    "compute_loss",
    "calculate_loss",
    "use_loss",
    "train_on",
    "train_turn",
    "use_for_training",
    "include_in_loss",
    "in_loss",
    "supervise",
    "supervised",
    "is_label",
    "is_target",
)
_EXCLUDED_KEYS = (
    "mask",
    "masked",
    "is_masked",
    "ignore",
    "ignored",
    "exclude",
    "excluded",
    "skip",
    "no_loss",
    "no_train",
    "no_training",
    "ignore_loss",
    "exclude_from_loss",
    "exclude_from_training",
)
_SEGMENTS = ("train_detail", "training_detail")
_FLAGS = frozenset((*_LEARNED_KEYS, *_EXCLUDED_KEYS, *_SEGMENTS))
_TEXT_PARTS = ("", "text", "input_text", "output_text", "refusal")
_THINKING_PARTS = ("thinking", "reasoning", "think")
_MEDIA = (
    "image",
    "images",
    "image_url",
    "input_image",
    "video",
    "videos",
    "video_url",
    "audio",
    "audios",
    "input_audio",
)
MEDIA_COLUMNS = (
    *_MEDIA,
    *(
        f"{kind}_{place}"
        for kind in ("image", "video", "audio")
        for place in ("path", "paths", "file", "files", "urls")
    ),
    *("img", "imgs", "photo", "photos", "picture", "pictures", "pixel_values"),
)


def turn_list(value: Any) -> list[Mapping[str, Any]] | None:
    """The turns in a list, or in one turn or JSON text of either, if each has a role; None for anything else."""
    turns = parse_json(value)
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list):
        return None
    turns = [parse_json(turn) for turn in turns]
    return turns if turns and all(isinstance(turn, Mapping) and turn_role(turn) for turn in turns) else None


def turn_role(turn: Mapping[str, Any]) -> str:
    """A turn's role as its data set spells it, in lower case with underscores; "" if it has none."""
    for key in _ROLE_KEYS:
        role = turn.get(key)
        if isinstance(role, str) and role.strip():
            return _role_name(role)
    return ""


@lru_cache(maxsize=1024)
def _role_name(role: str) -> str:
    return role.strip().lower().replace("-", "_").replace(" ", "_")


def to_messages(turns: Sequence[Mapping[str, Any]], reader: Reader, column: str) -> list[Message]:
    """Turns as messages; an assistant's thinking, its text and the calls that follow it are one message.

    Args:
        turns: as `turn_list` gives them.
        reader: of the row; it gets to know what the turns hold that is not read.
        column: where they stand.
    Raises: DroppedRowError: an unknown role, a turn that is not text, a turn of which only a part is to be learned,
        thinking under a name that is not known.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        turn_reader = Reader(turn)
        try:
            plain = _plain_turn(turn)
            for message in _read_turn(turn_reader) if plain is None else (plain,):
                if messages and _continues(messages[-1], message):
                    messages[-1] = _joined(messages[-1], message)
                else:
                    messages.append(message)
            if plain is None:
                _check_thinking(turn_reader)
        except DroppedRowError as reason:
            raise reason.within(f"{column}[{number}]") from None
        if plain is None:
            reader.note_unread(f"{column}[].{name}" for name in turn_reader.unread)
    return messages


def _plain_turn(turn: Mapping[str, Any]) -> Message | None:
    """The message of a turn that is a speaker and a text, as most are; None for any other, which takes longer to read.

    Raises: DroppedRowError: a thinking block that does not end, or a second one.
    """
    content = turn.get("content")
    if len(turn) != 2 or not isinstance(content, str) or not content.strip():
        return None
    name = turn_role(turn)
    role = ROLES.get(name)
    if role == "assistant" and name not in _APART:
        return assistant(content)
    return {"role": role, "content": content} if role in ("system", "user") else None


def assistant(content: str, reasoning: str = "") -> Message:
    """An assistant message; `reasoning` is its thinking block if that stands apart from its content.

    Raises: DroppedRowError: there is another thinking block in the content.
    """
    written = split_thinking(content)[0]
    if not reasoning.strip() or (written is not None and written.strip() == reasoning.strip()):
        return {"role": "assistant", "content": content}
    if written:
        raise DroppedRowError("two_thinking_blocks")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning.strip("\r\n")}


def _read_turn(turn: Reader) -> Iterator[Message]:
    name = turn_role({key: turn.get(key) for key in _ROLE_KEYS})
    role = ROLES.get(name)
    if role is None:
        raise DroppedRowError("unknown_role", "role")
    if role == "assistant":
        yield from _assistant_turn(turn, name)
        return
    _is_learned(turn, only_excluded=True)
    content = turn.get(*_CONTENT_KEYS)
    parts = _parts(content) if role == "user" else []
    for part in parts:
        if part.get("type") == "tool_result":
            yield {"role": "tool", "content": _result(part.get("content")), **_named(part, tool_call_id="tool_use_id")}
    content = [part for part in parts if part.get("type") != "tool_result"] if parts else content
    if role == "tool":
        named = {key: turn.get(key) for key in ("name", "tool_call_id") if turn.has(key)}
        yield {"role": role, "content": _result(content), **named}
    elif content or not parts:
        yield {"role": role, "content": _text(content)}


def _assistant_turn(turn: Reader, name: str) -> Iterator[Message]:
    content, learned = turn.get(*_CONTENT_KEYS), _is_learned(turn)
    thinking_parts = [part for part in _parts(content) if part.get("type") in _THINKING_PARTS]
    reasoning = "".join(map(_thinking_text, thinking_parts)) or thinking_under(turn, THINKING_KEYS)
    calls = [part for part in _parts(content) if part.get("type") == "tool_use"]
    if isinstance(content, list):
        content = [part for part in content if part not in thinking_parts and part not in calls]
    text = _text(content)
    stated = turn.get("tool_calls", "function_call")
    if name in _CALL_ROLES and stated is None:
        written, stated = split_thinking(text)
        reasoning, text = reasoning or written or "", ""
    elif name in _THINKING_ROLES or str(turn.get("channel")).lower() == "analysis":
        reasoning, text = f"{reasoning}{text}", ""
    message = assistant(text, reasoning)
    if calls or not is_missing(stated):
        message["tool_calls"] = [*to_calls(calls), *to_calls(parse_json(stated) if stated else [])]
    yield message if learned else {**message, "weight": 0}


def _continues(before: Message, message: Message) -> bool:
    """Whether a message belongs to the turn before it: thinking before an answer, or calls after a text."""
    if before["role"] != "assistant" or message["role"] != "assistant":
        return False
    only_thinks = not before["content"] and not before.get("tool_calls") and "reasoning_content" in before
    only_calls = not message["content"] and "tool_calls" in message and "reasoning_content" not in message
    return only_thinks or only_calls


def _joined(before: Message, message: Message) -> Message:
    if before.get("weight") != message.get("weight"):
        raise DroppedRowError("partly_excluded_turn")
    reasoning = "\n".join(m["reasoning_content"] for m in (before, message) if "reasoning_content" in m)
    joined = {**before, **assistant(before["content"] + message["content"], reasoning)}
    calls = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
    return {**joined, **({"tool_calls": calls} if calls else {})}


def _check_thinking(turn: Reader) -> None:
    """Raises: DroppedRowError: a key of an assistant's turn that is not read sounds like thinking and holds a text."""
    if ROLES.get(turn_role({key: turn.peek(key) for key in _ROLE_KEYS})) != "assistant":
        return
    check_unread_thinking(turn)


def check_unread_thinking(reader: Reader) -> None:
    """Raises: DroppedRowError: something that is not read sounds like thinking and holds a text."""
    for name in reader.unread:
        if _SOUNDS_LIKE_THINKING.search(name) and is_prose(reader.peek(name)):
            raise DroppedRowError("thinking_not_read", name)


def check_excluded(reader: Reader) -> None:
    """Raises: DroppedRowError: a column says that the row, or some turns by a list of flags, are not to be learned."""
    if reader.names.isdisjoint(_FLAGS):
        return
    for keys, wanted in ((_LEARNED_KEYS, True), (_EXCLUDED_KEYS, False)):
        for key in filter(reader.has, keys):
            value = parse_json(reader.peek(key))
            flags = list(map(is_true, value if isinstance(value, list) else [value]))
            if None in flags:
                continue
            reader.get(key)
            if (not wanted) in flags:
                raise DroppedRowError("excluded_row" if wanted not in flags else "partly_excluded_row", key)


def is_prose(value: Any) -> bool:
    """Whether a value is a text of several words, or a list: no switch, number or level."""
    return len(value.split()) > 1 if isinstance(value, str) else isinstance(value, list)


def _is_learned(turn: Reader, *, only_excluded: bool = False) -> bool:
    """Whether the data want this turn learned. Weights between 0 and 1 cannot be kept, so they are not read.

    With `only_excluded` what says that it is learned is not read: only an assistant's turns are.
    """
    if turn.names.isdisjoint(_FLAGS):
        return True
    segments = parse_json(turn.get(*_SEGMENTS))
    if isinstance(segments, list) and any(
        is_true(s.get("train", True)) is False for s in segments if isinstance(s, dict)
    ):
        raise DroppedRowError("partly_excluded_turn")
    learned = True
    for key in _LEARNED_KEYS:
        if turn.has(key) and (wanted := is_true(turn.peek(key))) is not None and not (wanted and only_excluded):
            turn.get(key)
            learned &= wanted
    for key in _EXCLUDED_KEYS:
        if turn.has(key) and (excluded := is_true(turn.peek(key))) is not None and (excluded or not only_excluded):
            turn.get(key)
            learned &= not excluded
    return learned


def _parts(content: Any) -> list[Mapping[str, Any]]:
    """The parts of a content that is a list of them."""
    if not isinstance(content, list):
        return []
    return [part if isinstance(part, Mapping) else {"type": "text", "text": part} for part in content]


def _text(content: Any) -> str:
    """The text of a content; of a list of parts all must be text. Raises: DroppedRowError: something is not."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return "" if content is None else as_text(content)
    return "".join(map(_part_text, _parts(content)))


def _part_text(part: Mapping[str, Any]) -> str:
    kind = part.get("type") or ""
    if kind not in _TEXT_PARTS or any(not is_missing(part.get(key)) for key in _MEDIA):
        raise DroppedRowError("not_text")
    texts: list[str] = [part[key] for key in (*_CONTENT_KEYS, "refusal") if isinstance(part.get(key), str)]
    if not texts:
        raise DroppedRowError("not_text")
    return next(filter(None, texts), "")


def _thinking_text(part: Mapping[str, Any]) -> str:
    return _text(
        next((part[key] for key in ("thinking", "reasoning", "text", "content", "summary") if part.get(key)), None)
    )


def thinking_under(reader: Reader, keys: Sequence[str]) -> str:
    """The thinking block under the first of `keys` that holds a text or parts of one, "" for none."""
    key = next((key for key in keys if reader.has(key) and isinstance(reader.peek(key), str | list)), None)
    value = None if key is None else reader.get(key)
    return "".join(map(_thinking_text, _parts(value))) if isinstance(value, list) else _text(value)


def _result(content: Any) -> str:
    """A tool's result as text: a text, its parts, or any other value as JSON."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content):
        return _text(content)
    return json.dumps(content, ensure_ascii=False, default=str)


def _named(part: Mapping[str, Any], **keys: str) -> dict[str, Any]:
    return {key: part[name] for key, name in keys.items() if part.get(name)}
