"""The base model's tokenizer, read with `tokenizers` alone: importing transformers costs seconds where torch is."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from finemill.artifacts.manifest import sha256_file
from finemill.components.chat_format.byte_level import ByteLevelEncoder, byte_level_encoder
from finemill.components.chat_format.template import BROKEN, NONCHARACTERS
from finemill.components.chat_format.tokens import Tokens
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError

_NEVER = re.compile(r"(?!)")


class ChatTokenizer:
    """Encodes rendered conversations; control tokens are recognized only where the template wrote them."""

    def __init__(self, source: str, named_tokens: dict[str, str], digest: str, new_tokens: Sequence[str] = ()) -> None:
        self._backend = backend = Tokenizer.from_str(source)
        self.new_tokens = _add_tokens(backend, new_tokens)
        self._source = backend.to_str() if new_tokens else source
        backend.no_truncation()
        backend.no_padding()
        self.named_tokens = named_tokens
        self.digest = digest
        added = backend.get_added_tokens_decoder().values()
        self._added = {token.content for token in added}
        self._control = {token.content for token in added if token.special}
        self._note_control()
        self._ends = {self.eos_token} if self.eos_token else set()

    @property
    def eos_token(self) -> str | None:
        """The token that ends a document, None if the tokenizer names none."""
        return self.named_tokens.get("eos_token")

    @cached_property
    def document_start(self) -> str:
        """The tokens with which the tokenizer begins every text, as text: BOS, or nothing."""
        encoding = self._backend.encode("a")
        special = list(takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)))
        names = self._backend.get_added_tokens_decoder()
        return "".join(names[token].content for token, _ in special)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """What tokenizer.json says."""
        parts: dict[str, Any] = json.loads(self._source)
        return parts

    @cached_property
    def _byte_level(self) -> ByteLevelEncoder | None:
        return byte_level_encoder(self._backend, self._parts)

    @cached_property
    def longest_token(self) -> int | None:
        """Characters of a text that one token may hold at most, None if there is no such limit."""
        kinds, model = _normalizers(self._parts["normalizer"]), self._parts["model"]
        may_be_unknown = model.get("unk_token") is not None and not model.get("byte_fallback")
        if model["type"] != "BPE" or may_be_unknown or not kinds <= {"NFC", "Prepend", "Replace"}:
            return None
        # NFC makes one letter of up to three.
        longest = max(map(len, (*model["vocab"], *self._added)))
        return 4 * longest if "NFC" in kinds else longest

    def check_tokens(self, names: Iterable[str], needed_by: str) -> None:
        """Raises: UserError: the tokenizer lacks a token, or the one that ends a text."""
        missing = [name for name in names if name not in self._added]
        if missing:
            raise UserError(
                f"{needed_by} needs the tokens {', '.join(missing)}, which the base model's tokenizer does not have; "
                "alpaca, vicuna and mistral need none of their own"
            )
        if self.eos_token is None:
            raise UserError(f"{needed_by} ends answers with eos_token, which tokenizer_config.json does not name")

    def add_roles(self, chat: str) -> None:
        """Count the added tokens in `chat`, which a template wrote, as control tokens though they are not special.

        So it is with DeepSeek's role tokens. Marks of thinking blocks stay as they are: models write them.
        """
        self._control |= {token for token in self._added if token in chat and "think" not in token}
        self._note_control()

    def _note_control(self) -> None:
        self.control = _any_of(self._control)
        # Most texts hold none of the letters with which such tokens begin.
        self._control_begins = {token[0] for token in self._control if token}

    def add_ends(self, text: str) -> None:
        """Count the control tokens in `text`, which a template wrote after an answer, as such that end one."""
        self._ends.update(match[0] for match in self.control.finditer(text))

    def without_end(self, answer: str) -> str:
        """An answer without the tokens that end it, which only one with a space before them mentions."""
        if not answer.rstrip().endswith(tuple(self._ends)):
            return answer
        return re.sub(rf"(?<! )(?:[\r\n]*(?:{_any_of(self._ends).pattern}))+\s*\Z", "", answer)

    def break_control_tokens(self, value: Any) -> Any:
        """A copy of messages or tools in which no text holds a control token: `BROKEN` stands in it.

        Raises: DroppedRowError: a text holds characters that stand for marks.
        """
        if isinstance(value, str):
            check_characters(value)
            if not any(letter in value for letter in self._control_begins):
                return value
            return self.control.sub(lambda match: f"{match[0][0]}{BROKEN}{match[0][1:]}", value)
        if isinstance(value, list):
            return [self.break_control_tokens(item) for item in value]
        if isinstance(value, dict):
            return {key: self.break_control_tokens(item) for key, item in value.items()}
        return value

    def decode(self, input_ids: Sequence[int]) -> str:
        """The text of token ids, control tokens as they are written."""
        text: str = self._backend.decode(list(input_ids), skip_special_tokens=False)
        return text

    def encode(self, texts: Sequence[str]) -> list[Tokens | None]:
        """Encode texts as `tokenizer(text, add_special_tokens=False)` does, each `BROKEN` left out.

        Returns: None for a text in which `BROKEN` has no tokens of its own.
        """
        found: list[Tokens | None] = [None] * len(texts)
        if self._byte_level is not None:
            plain = [number for number, text in enumerate(texts) if BROKEN not in text]
            for number, tokens in zip(plain, self._byte_level.encode([texts[n] for n in plain]), strict=True):
                found[number] = tokens
        rest = [number for number, tokens in enumerate(found) if tokens is None]
        encodings = self._backend.encode_batch([texts[n] for n in rest], add_special_tokens=False) if rest else ()
        for number, encoding in zip(rest, encodings, strict=True):
            found[number] = _tokens(encoding, texts[number])
        return found


def _add_tokens(backend: Tokenizer, tokens: Sequence[str]) -> dict[str, int]:
    """Add tokens that are texts, not control tokens. Returns: their ids. Raises: UserError: one is there already."""
    for token in tokens:
        if (number := backend.token_to_id(token)) is not None:
            raise UserError(f"new_tokens: {token} is token {number} of the base model already: leave it out")
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return {token: number for token in tokens if (number := backend.token_to_id(token)) is not None}


def _normalizers(normalizer: Any) -> set[str]:
    """The kinds of normalizers in a tokenizer's description."""
    if normalizer is None:
        return set()
    if normalizer["type"] == "Sequence":
        return {kind for part in normalizer["normalizers"] for kind in _normalizers(part)}
    plain = normalizer["type"] != "Replace" or normalizer["pattern"] == {"String": " "}
    return {normalizer["type"] if plain else "other"}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else _NEVER


def _tokens(encoding: Encoding, text: str) -> Tokens | None:
    input_ids = np.array(encoding.ids, np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    if BROKEN not in text:
        return Tokens(input_ids, offsets)
    positions = np.array([match.start() for match in re.finditer(BROKEN, text)])
    touched = np.any((offsets[:, :1] <= positions) & (positions < offsets[:, 1:]), axis=1)
    if (offsets[touched, 1] - offsets[touched, 0] > 1).any():
        return None
    kept = offsets[~touched]
    moved = kept - (positions[None, :] < kept.reshape(-1, 1)).sum(axis=1).reshape(-1, 2)
    return Tokens(input_ids[~touched], moved)


def check_characters(text: str) -> None:
    """Raises: DroppedRowError: the text holds characters that stand for marks."""
    if not text.isascii() and NONCHARACTERS.search(text):
        raise DroppedRowError("unicode_noncharacters")


def load_tokenizer(base_dir: Path, new_tokens: Sequence[str] = ()) -> ChatTokenizer:
    """The tokenizer of a base, with further tokens.

    Raises: UserError: the folder has no tokenizer.json, or a new token is in it already.
    """
    path = base_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            "the base model has no tokenizer.json: load it with transformers.AutoTokenizer and save it again, "
            "which writes that file"
        )
    # Trimmed offsets leave tokens of white space without characters, and so without labels; ids are the same.
    source = re.sub(r'("trim_offsets"\s*:\s*)true', r"\1false", path.read_text(encoding="utf-8"))
    return ChatTokenizer(source, _named_tokens(base_dir), sha256_file(path), new_tokens)


def _named_tokens(base_dir: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, which templates use by name."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = base_dir / name
        values = json.loads(file.read_bytes()) if file.is_file() else {}
        extra = values.get("extra_special_tokens")
        for key, value in {**values, **(extra if isinstance(extra, dict) else {})}.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                named[key] = text
    return named
