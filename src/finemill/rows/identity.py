"""When two rows, or their questions, are the same: what data-prep and synthesize compare."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from finemill.rows.conversation import Conversation, first_question

_IDENTITY = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True)


def normalize_text(text: str) -> str:
    """One spelling for texts that differ only in case, character width or white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> bytes:
    """16 bytes of the text's sha256. Raises: UnicodeEncodeError: half of a pair of surrogates is in it."""
    return hashlib.sha256(text.encode()).digest()[:16]


def question_key(conversation: Conversation) -> bytes:
    """The key of the normalized first question. Raises: UnicodeEncodeError: as `text_key`."""
    return text_key(normalize_text(first_question(conversation)))


def row_id(row: Mapping[str, Any]) -> str:
    """16 hex digits of a row's content, whatever the order of its keys. Raises: UnicodeEncodeError: as `text_key`."""
    return text_key(_IDENTITY.encode(row)).hex()[:16]
