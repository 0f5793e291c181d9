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

from finemill.artifacts.messages import Message
from finemill.rows.channels import channel_messages, in_channels
from finemill.rows.learned import FLAGS, is_learned
from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.speakers import CALL_ROLES, ROLE_KEYS, ROLES, THINKING_ROLES, named, snake_case, turn_role
from finemill.rows.thinking import bare_thinking, in_think_tags, split_thinking, thinking_of
from finemill.rows.tools import CALLED, are_calls, to_calls
from finemill.rows.values import as_text, holds_nothing, is_missing, parse_json

_APART = frozenset((*CALL_ROLES, *THINKING_ROLES))
_CONTENT_KEYS = ("content", "value", "text", "utterance", "message", "body", "msg", "mes", "parts")
_SYSTEM_KEYS = ("system_prompt", "system")
_RESULT_KEYS = ("result", "output", "response", "tool_output", "observation", "results")
_CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls", "calls", "tool_use")
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
    "thinking_blocks",
    "thinking_trace",
    "thought_process",
    "reasoning_trace",
    "model_reasoning",
    "reasoning_trajectory",
    "thinking_trajectory",
    "reasoning_steps",
    "internal_thoughts",
    "inner_thoughts",
    "scratchpad",
    "think",
)
# Other names that some text of an assistant's turn may have which it is wrong to leave out.
_SOUNDS_LIKE_THINKING = re.compile(
    r"think|thought|reasoning|rationale|scratch|monologue|deliberat|(?:\b|_)cot(?:\b|_)", re.IGNORECASE
)
# Beside an answer these are about it; beside a row they may be anything.
_THINKING_IN_TURNS = ("analysis", "internal", "plan", "planning", "reason", "reflection", "reflections")
_SOUNDS_LIKE_CALLS = re.compile(r"tool|function|call|invocation|action|plugin", re.IGNORECASE)
_TEXT_PARTS = ("", "text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
_THINKING_PARTS = ("thinking", "reasoning", "think")
_THINKING_TEXTS = ("thinking", "reasoning", "text", "content", "summary", "thought")
# Objects in which LangChain, LiteLLM and others keep what OpenAI's messages have no key for.
_MORE_OF_TURNS = ("additional_kwargs", "provider_specific_fields", "model_extra")
# Names of pictures, sounds and films, and of where they lie; some of them are also what texts are called.
_MEDIA = re.compile(
    r"(?:input_|query_|question_)?(?:(?:image|img|photo|picture|screenshot|video|audio)s?|(?P<kind>figure|frame|clip|sound"
    r"|speech)s?)(?P<place>_?(?:path|file|filename|file_name|url|uri|base64|b64|bytes|data|list|\d+)s?)?"
    r"|pixel_values|input_features"
)
# WebDataset's columns, which hold what files with these ends do.
_MEDIA_ENDS = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "tiff", "mp3", "wav", "flac", "ogg", "mp4", "avi", "webm")
)
_MEDIA_FILE = re.compile(r"\S+\.(?:jpe?g|png|webp|gif|tiff|mp3|wav|flac|ogg|mp4|avi|webm)", re.IGNORECASE)
_OF_MEDIA = ("media", "files", "file", "attachments")


@lru_cache(maxsize=4096)
def _media_types(name: str) -> tuple[type, ...]:
    """The types that a value of this name has if it is a picture, a sound or a film; none for other names."""
    if name in _MEDIA_ENDS:
        return (bytes, dict)
    match = _MEDIA.fullmatch(snake_case(name))
    if match is None:
        return ()
    return (list, dict, bytes) if match["kind"] and not match["place"] else (str, list, dict, bytes)


def media_in(values: Mapping[Any, Any]) -> str | None:
    """The name of the first value that is a picture, a sound or a film, None if there is none."""
    for name, value in values.items():
        if isinstance(name, str) and isinstance(value, _media_types(name)) and not holds_nothing(value):
            return name
        if name in _OF_MEDIA and any(isinstance(v, str) and _MEDIA_FILE.fullmatch(v) for v in _items(value)):
            return str(name)
    return None


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_PART_KEYS = frozenset(
    (
        "type",
        "id",
        "name",
        "input",
        "tool_use_id",
        "refusal",
        "thought",
        *_CONTENT_KEYS,
        *_THINKING_TEXTS,
        *_THINKING_PARTS,
    )
)
# What a call or a result is called in Gemini's and Bedrock's parts, and its fields.
_GEMINI_CALL, _GEMINI_RESULT = {"name": "name", "args": "input"}, {"name": "name", "response": "content"}
_FOREIGN_PARTS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("functionCall", "tool_use", _GEMINI_CALL),
    ("function_call", "tool_use", _GEMINI_CALL),
    ("functionResponse", "tool_result", _GEMINI_RESULT),
    ("function_response", "tool_result", _GEMINI_RESULT),
    ("toolUse", "tool_use", {"toolUseId": "id", "name": "name", "input": "input"}),
    ("toolResult", "tool_result", {"toolUseId": "tool_use_id", "content": "content"}),
    ("reasoningContent", "thinking", {"reasoningText": "thinking"}),
)
_NAMESPACE = "functions."
_TURN_KEYS = frozenset((*ROLE_KEYS, *_CONTENT_KEYS, *_RESULT_KEYS, *_CALL_KEYS, *THINKING_KEYS, *FLAGS, "tool_call_id"))


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
        try:
            plain = _plain_turn(turn)
            turn_reader = Reader(turn if plain else named(turn, _TURN_KEYS))
            for message in _read_turn(turn_reader) if plain is None else (plain,):
                if messages and _continues(messages[-1], message):
                    messages[-1] = _joined(messages[-1], message)
                else:
                    messages.append(message)
            if plain is None:
                _check_answer(turn_reader, messages[-1] if messages else {})
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
    if in_channels(content):
        return _from_channels(content, reasoning)
    content = in_think_tags(content)
    written, reasoning = split_thinking(content)[0], bare_thinking(reasoning, content)
    if not reasoning.strip() or (written is not None and written.strip() == reasoning.strip()):
        return {"role": "assistant", "content": content}
    if written:
        raise DroppedRowError("two_thinking_blocks")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning.strip("\r\n")}


def _from_channels(content: str, reasoning: str) -> Message:
    """An assistant message of gpt-oss's channels. Raises: DroppedRowError: they say something else, too."""
    parts = channel_messages(content)
    thoughts = [part.text for part in parts or () if part.channel == "analysis"]
    calls = [{"name": part.function, "arguments": part.text} for part in parts or () if part.function is not None]
    said = [part.text for part in parts or () if part.channel == "final" and part.function is None]
    if parts is None or len(thoughts) + len(calls) + len(said) < len(parts) or len(said) > 1:
        raise DroppedRowError("channels_not_read", "content")
    message = assistant("".join(said), reasoning or "\n".join(thoughts))
    return {**message, "tool_calls": to_calls(calls)} if calls else message


def _read_turn(turn: Reader) -> Iterator[Message]:
    name = _speaker(turn)
    role = ROLES.get(name)
    if role is None:
        raise DroppedRowError("unknown_role", "role")
    if role != "tool" and (media := media_in(turn.values)):
        raise DroppedRowError("not_text", media)
    _note_unread_parts(turn)
    if role == "assistant":
        yield from _assistant_turn(turn, name)
        return
    is_learned(turn, only_excluded=True)
    content = turn.get(*_CONTENT_KEYS, *(_SYSTEM_KEYS if role == "system" else ()))
    parts = _parts(content) if role == "user" or _holds_results(content) else []
    for part in parts:
        if part.get("type") == "tool_result":
            yield {
                "role": "tool",
                "content": _result(part.get("content")),
                **_named(part, name="name", tool_call_id="tool_use_id"),
            }
    content = [part for part in parts if part.get("type") != "tool_result"] if parts else content
    if role == "tool" and not parts:
        content = turn.get(*_RESULT_KEYS) if content is None else content
        known = {key: turn.get(key) for key in ("name", "tool_call_id") if turn.has(key)}
        if isinstance(known.get("name"), str):
            known["name"] = known["name"].removeprefix(_NAMESPACE)
        yield {"role": role, "content": _result(content), **known}
    elif content or not parts:
        yield {"role": role, "content": text_of(content)}


def _note_unread_parts(turn: Reader) -> None:
    """Name what the parts of a content hold that nothing is made of."""
    parts = _parts(turn.peek("content"))
    turn.note_unread(
        f"content[].{key}"
        for part in parts
        for key, value in part.items()
        if key not in _PART_KEYS and not holds_nothing(value)
    )


def _speaker(turn: Reader) -> str:
    for key in ROLE_KEYS:
        if name := turn_role({key: turn.peek(key)}):
            turn.get(key)
            return name
    return ""


def _assistant_turn(turn: Reader, name: str) -> Iterator[Message]:
    content, learned = turn.get(*_CONTENT_KEYS, "refusal"), is_learned(turn)
    thinking_parts = [part for part in _parts(content) if part.get("type") in _THINKING_PARTS]
    reasoning = "".join(map(_thinking_text, thinking_parts)) or _thinking_beside(turn)
    calls = [part for part in _parts(content) if part.get("type") == "tool_use"]
    if isinstance(content, list):
        content = [part for part in _parts(content) if part not in thinking_parts and part not in calls]
    given = content if name in CALL_ROLES and are_calls(content if isinstance(content, list) else [content]) else None
    text = text_of(content) if given is None else ""
    key = next((key for key in _CALL_KEYS if turn.has(key) and not holds_nothing(turn.peek(key))), None)
    stated = given if key is None else turn.get(key)
    recipient = turn.peek("recipient")
    if stated is None and isinstance(recipient, str) and recipient.startswith(_NAMESPACE):
        stated, text = {"name": turn.get("recipient").removeprefix(_NAMESPACE), "arguments": text}, ""
    if name in CALL_ROLES and stated is None:
        written, stated = split_thinking(text)
        reasoning, text = reasoning or written or "", ""
    elif name in THINKING_ROLES or str(turn.get("channel")).lower() == "analysis":
        reasoning, text = f"{reasoning}{text}", ""
    message = assistant(text, reasoning)
    if calls or not is_missing(stated):
        message["tool_calls"] = [*to_calls(calls), *to_calls(parse_json(stated) if stated else [])]
    yield message if learned else {**message, "weight": 0}


def _thinking_beside(turn: Reader) -> str:
    """The thinking block under a key of its own; others that say the same, as OpenRouter's, are read with it."""
    reasoning = thinking_under(turn, THINKING_KEYS)
    for key in THINKING_KEYS if reasoning else ():
        if (
            turn.has(key)
            and _holds_thinking(turn.peek(key))
            and thinking_under(Reader(turn.values), [key]) == reasoning
        ):
            turn.get(key)
    for name in _MORE_OF_TURNS:
        if not reasoning and isinstance(more := turn.peek(name), Mapping):
            inside = Reader(more)
            reasoning = thinking_under(inside, THINKING_KEYS)
            turn.note_unread(f"{name}.{key}" for key in inside.unread)
            turn.get(name)
    return reasoning


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


def _check_answer(turn: Reader, message: Message) -> None:
    """Raises: DroppedRowError: what is not read of an assistant's turn sounds like its thinking, or like calls.

    Beside an answer that thinks, `message`, the same thinking may stand again.
    """
    if ROLES.get(_speaker(turn)) != "assistant":
        return
    if not thinking_of(message):
        check_unread_thinking(turn, in_turn=True)
    for name in turn.unread:
        if _SOUNDS_LIKE_CALLS.search(name) and _holds_calls(turn.peek(name)):
            raise DroppedRowError("calls_not_read", name)


def _holds_calls(value: Any) -> bool:
    value = parse_json(value)
    items = [parse_json(item) for item in value] if isinstance(value, list) else [value]
    return any(isinstance(item, Mapping) and not CALLED.isdisjoint(map(snake_case, map(str, item))) for item in items)


def check_unread_thinking(reader: Reader, *, in_turn: bool = False) -> None:
    """Raises: DroppedRowError: something that is not read sounds like thinking and holds a text."""
    for name in reader.unread:
        value = reader.peek(name)
        sounds = _SOUNDS_LIKE_THINKING.search(name) or (in_turn and name.lower() in _THINKING_IN_TURNS)
        if sounds and is_prose(value):
            raise DroppedRowError("thinking_not_read", name)
        for key in value if in_turn and isinstance(value, Mapping) else ():
            if _SOUNDS_LIKE_THINKING.search(str(key)) and is_prose(value[key]):
                raise DroppedRowError("thinking_not_read", f"{name}.{key}")


def is_prose(value: Any) -> bool:
    """Whether a value is a text of several words, a list, or an object with either: no switch, number or level."""
    if isinstance(value, Mapping):
        return any(map(is_prose, value.values()))
    if isinstance(value, list):
        return any(map(is_prose, value))
    return isinstance(value, str) and len(value.split()) > 1


def _parts(content: Any) -> list[Mapping[str, Any]]:
    """The parts of a content that is a list of them."""
    if isinstance(content, Mapping) and isinstance(content.get("parts"), list):
        content = content["parts"]
    if not isinstance(content, list):
        return []
    return [_known_part(part) if isinstance(part, Mapping) else {"type": "text", "text": part} for part in content]


def _known_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of Gemini's or Bedrock's as one of Anthropic's, any other as it is."""
    if part.get("thought") is True and isinstance(part.get("text"), str):
        return {"type": "thinking", "thinking": part["text"]}
    for key, kind, names in _FOREIGN_PARTS:
        if isinstance(inner := part.get(key), Mapping):
            return {"type": kind, **{names[name]: value for name, value in inner.items() if name in names}}
    return part


def _holds_results(content: Any) -> bool:
    parts = _parts(content)
    return bool(parts) and all(part.get("type") == "tool_result" for part in parts)


def text_of(content: Any, field: str = "") -> str:
    """The text of a content; of a list of parts all must be text. Raises: DroppedRowError: not all is, in `field`."""
    if isinstance(content, Mapping):
        content = _parts(content) or [content]
    if not isinstance(content, list):
        return "" if content is None else as_text(content, field)
    try:
        return "".join(map(_part_text, _parts(content)))
    except DroppedRowError as reason:
        raise reason.within(field) if field else reason from None


def _part_text(part: Mapping[str, Any]) -> str:
    kind = part.get("type") or ""
    if kind not in _TEXT_PARTS or media_in(part):
        raise DroppedRowError("not_text")
    texts: list[str] = [part[key] for key in (*_CONTENT_KEYS, "refusal") if isinstance(part.get(key), str)]
    if not texts:
        raise DroppedRowError("not_text")
    return next(filter(None, texts), "")


def _thinking_text(part: Mapping[str, Any]) -> str:
    return text_of(next((part[key] for key in _THINKING_TEXTS if part.get(key)), None))


def thinking_under(reader: Reader, keys: Sequence[str]) -> str:
    """The thinking block under the first of `keys` that holds a text or parts of one, "" for none."""
    key = next((key for key in keys if reader.has(key) and _holds_thinking(reader.peek(key))), None)
    value = None if key is None else reader.get(key)
    if isinstance(value, Mapping):
        return _thinking_text(value)
    if not isinstance(value, list):
        return text_of(value)
    text = ("\n" if isinstance(value[0], str) else "").join(map(_thinking_text, _parts(value)))
    if not text.strip() and not holds_nothing(value):
        raise DroppedRowError("thinking_not_read", key or "")
    return text


def _holds_thinking(value: Any) -> bool:
    return isinstance(value, str | list) or (isinstance(value, Mapping) and any(value.get(k) for k in _THINKING_TEXTS))


def _result(content: Any) -> str:
    """A tool's result as text: a text, its parts, or any other value as JSON."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content):
        return text_of(content)
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and len(p) == 1 and p.keys() <= {"json", "text"} for p in content)
    ):
        return "".join(
            str(part["text"]) if "text" in part else json.dumps(part["json"], ensure_ascii=False) for part in content
        )
    return json.dumps(content, ensure_ascii=False, default=str)


def _named(part: Mapping[str, Any], **keys: str) -> dict[str, Any]:
    return {key: part[name] for key, name in keys.items() if part.get(name)}
