"""Rows that are texts: learned whole, between the tokens with which the tokenizer begins and ends a document."""

import re
from collections.abc import Iterator
from itertools import islice

from finemill.components.chat_format.tokenize import ChatTokenizer, check_characters
from finemill.components.chat_format.tokens import Tokens
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError

# How the chat templates of the usual families begin a text and a turn.
_BEGIN = (
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|\[gMASK\]<sop>"
    r"|<\uff5cbegin\u2581of\u2581sentence\uff5c>)?\s*"
)
_ROLE = (
    r"(?:<\|im_start\|>(?:system|user|assistant)|<\|start_header_id\|>|<start_of_turn>|<\|turn>|\[INST\]"
    r"|<\|(?:system|user|assistant)\|>"
    r"|<\|start\|>(?:system|developer|user|assistant)|<\uff5c(?:User|Assistant)\uff5c>"
    r"|<\|START_OF_TURN_TOKEN\|>|<\|im_(?:system|user|assistant)\|>|<\|header_start\|>|<\|start_of_role\|>"
    r"|\[\|(?:system|user|assistant)\|\]|<\|prompter\|>|<beginning_of_sentence>|GPT4 Correct (?:User|Assistant):)"
)
# Where roles are plain words: Alpaca's, Guanaco's, Vicuna's, with or without the sentences before them.
_ASKS = r"(?:###\s*(?:Instruction|Human|User|Question|Input)s?:|USER:|\A\s*(?:Human|User|Instruction):)"
_SAYS = r"(?:###\s*(?:Response|Assistant|Answer|Output)s?:|ASSISTANT:|\n\s*(?:Assistant|Response):)"
_PLAIN_CHAT = re.compile(rf"[^\n]{{0,400}}\s*{_ASKS}.*?{_SAYS}", re.DOTALL)
_PLAIN_PROMPT = re.compile(rf"{_SAYS}\s*\Z")
_BEGINS_CHAT = re.compile(f"{_BEGIN}{_ROLE}")
_ROLE_MARK = re.compile(_ROLE)
_LONGEST_MARK = 64
# How they end one, also where roles are plain words (Alpaca, Vicuna).
_ENDS_CHAT = re.compile(
    r"(?:</s>|<\|im_end\|>|<\|eot_id\|>|<\|end\|>|<\|end_of_text\|>|<end_of_turn>|<eos>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>)\s*\Z"
)

# A text of more characters is cut by the tokens of so many samples of it: to encode it once is what it costs.
_SAMPLED_CHARACTERS, _SAMPLES = 1 << 16, 16


def begins_rendered_chat(text: str) -> bool:
    """Whether a role's marker begins `text`, so that a chat template wrote it; one further on may be typed."""
    return _BEGINS_CHAT.match(text) is not None


def is_rendered_chat(text: str) -> bool:
    """Whether a chat template wrote a document: a role's marker begins it, there are several, or an end marker ends it.

    That of the tokenizer that reads it is not in `text`.
    """
    several = len(list(islice(_ROLE_MARK.finditer(text), 2))) > 1
    return several or begins_rendered_chat(text) or _ENDS_CHAT.search(text) is not None or _is_plain_chat(text)


def is_rendered_prompt(text: str) -> bool:
    """Whether a template wrote a question: a role's marker begins it, or it ends where an answer is to begin."""
    return begins_rendered_chat(text) or (
        _PLAIN_PROMPT.search(text[-_LONGEST_MARK:]) is not None and _is_plain_chat(text)
    )


def _is_plain_chat(text: str) -> bool:
    return _PLAIN_CHAT.match(text) is not None


def document_text(text: str, tokenizer: ChatTokenizer, *, read_control_tokens: bool) -> str:
    """A document as it is encoded; control tokens in it are broken up, but for its own first and last.

    Args:
        text: the row's text.
        tokenizer: the base model's.
        read_control_tokens: whether a rendered chat's control tokens are control tokens; else it is refused.
    Raises: DroppedRowError: a rendered chat, or characters that stand for marks. UserError: there is no end-of-text
        token.
    """
    check_characters(text)
    first, last = tokenizer.document_start, tokenizer.eos_token
    if last is None:
        raise UserError("the base model's tokenizer_config.json names no eos_token, which must end every text row")
    text = text.removeprefix(first)
    rendered = is_rendered_chat(text.rstrip().removesuffix(last))
    if rendered and not read_control_tokens:
        raise DroppedRowError("rendered_chat", "text")
    if rendered:
        return first + text + ("" if text.rstrip().endswith(last) else last)
    return f"{first}{tokenizer.break_control_tokens(text.removesuffix(last))}{last}"


def cut_document(text: str, limit: int, tokenizer: ChatTokenizer) -> list[tuple[str, Tokens | None]]:
    """A text in pieces of at most `limit` tokens, all of about one length, cut where there is white space near by.

    Together they are the text to the last character.
    Returns: each with its tokens, None where `BROKEN` in it has no tokens of its own.
    """
    number = 1
    if len(text) > _SAMPLED_CHARACTERS:
        number = _num_pieces(len(text) * _tokens_per_character(text, tokenizer), limit)
    return list(_fitting(_cut(text, number), limit, tokenizer))


def _fitting(parts: list[str], limit: int, tokenizer: ChatTokenizer) -> Iterator[tuple[str, Tokens | None]]:
    """Parts with their tokens, those that are too long in pieces."""
    for part, tokens in zip(parts, tokenizer.encode(parts), strict=True):
        number = 1 if tokens is None else _num_pieces(len(tokens.input_ids), limit)
        if number == 1:
            yield part, tokens
        else:
            yield from _fitting(_cut(part, number), limit, tokenizer)


def _num_pieces(num_tokens: float, limit: int) -> int:
    # At other places than the whole text's tokens a few more are needed.
    return 1 if num_tokens <= limit else -int(-num_tokens * 102 // (limit * 100))


def _tokens_per_character(text: str, tokenizer: ChatTokenizer) -> float:
    """How many tokens a character of a long text is, from samples all over it."""
    places = range(0, len(text), len(text) // _SAMPLES + 1)
    samples = [text[place : place + _SAMPLED_CHARACTERS // _SAMPLES] for place in places]
    found = [tokens for tokens in tokenizer.encode(samples) if tokens is not None]
    return sum(len(tokens.input_ids) for tokens in found) / max(1, sum(map(len, samples)))


def _cut(text: str, number: int) -> list[str]:
    pieces, start = [], 0
    for index in range(1, number):
        end = _space_before(text, start + 1, index * len(text) // number, len(text) // number // 4)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _space_before(text: str, first: int, end: int, reach: int) -> int:
    """Where the last white space in the `reach` characters before `end` begins, or `end` itself; not before `first`."""
    spaces = [match.start() for match in re.finditer(r"\s+", text[max(first, end - reach) : end])]
    return max(first, end - reach) + spaces[-1] if spaces else max(first, end)
