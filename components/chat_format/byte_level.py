"""Byte-level tokenizers the quick way: what stands between added tokens is encoded by itself, and each piece once.

Such a tokenizer (GPT-2's kind: Llama 3, Qwen, Tekken) splits a text at its added tokens before anything else, and each
of its tokens stands for a known number of bytes. So pieces that several texts share, as parts of one conversation do,
are encoded once, and where tokens stand follows from their lengths, without the offsets that cost the library more
than the ids.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from finemill.components.chat_format.tokens import Tokens


class ByteLevelEncoder:
    """Encodes texts without special tokens around them; `byte_lengths` are the bytes of each token by id."""

    def __init__(self, backend: Tokenizer, byte_lengths: NDArray[np.int64], *, composes: bool) -> None:
        added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._backend = backend
        self._byte_lengths = byte_lengths
        self._composes = composes
        self._added = {token: np.array([number], np.int32) for token, number in added.items()}
        self._edge = re.compile(f"({'|'.join(longest_first)})" if longest_first else "((?!))")

    def encode(self, texts: Sequence[str]) -> list[Tokens | None]:
        """Tokens of each text, None where it has bytes that its tokens do not stand for: it must be encoded otherwise.

        So it is with letters that the tokenizer composes (NFC).
        """
        split = [[piece for piece in self._edge.split(text) if piece] for text in texts]
        found = self._encode_pieces(set(chain.from_iterable(split)))
        encoded = [number for number, pieces in enumerate(split) if all(map(found.__contains__, pieces))]
        parts = [[found[piece] for piece in split[number]] for number in encoded]
        input_ids = np.concatenate([np.empty(0, np.int32), *chain.from_iterable(parts)])
        ends = self._byte_lengths[input_ids].cumsum()
        offsets = np.stack((ends - self._byte_lengths[input_ids], ends), axis=1)
        tokens: list[Tokens | None] = [None] * len(texts)
        start = 0
        for number, own in zip(encoded, parts, strict=True):
            end = start + sum(map(len, own))
            own_offsets = offsets[start:end]
            tokens[number] = Tokens(input_ids[start:end], own_offsets - own_offsets[:1, :1], in_bytes=True)
            start = end
        return tokens

    def _encode_pieces(self, pieces: Iterable[str]) -> dict[str, NDArray[np.int32]]:
        """Token ids of pieces, added tokens among them; none of a piece with bytes that its tokens do not stand for."""
        new = [piece for piece in pieces if piece not in self._added]
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(new, add_special_tokens=False)]
        flat = np.fromiter(chain.from_iterable(ids), np.int32)
        edges = [0, *accumulate(map(len, ids))]
        positions = np.concatenate((np.zeros(1, np.int64), self._byte_lengths[flat].cumsum()))[edges]
        found = dict(self._added)
        for piece, start, end, num_bytes in zip(new, edges, edges[1:], np.diff(positions).tolist(), strict=False):
            if num_bytes == (len(piece) if piece.isascii() else self._num_bytes(piece)):
                found[piece] = flat[start:end]
        return found

    def _num_bytes(self, piece: str) -> int:
        """Bytes of a piece, -1 for one whose letters the tokenizer composes."""
        return -1 if self._composes and not unicodedata.is_normalized("NFC", piece) else len(piece.encode())


def byte_level_encoder(backend: Tokenizer, parts: Mapping[str, Any]) -> ByteLevelEncoder | None:
    """The encoder for a tokenizer, None for one of another kind.

    Args:
        backend: the tokenizer, which neither pads nor cuts.
        parts: what tokenizer.json says of it.
    """
    added = backend.get_added_tokens_decoder()
    splitters = _in_order(parts["pre_tokenizer"], "pretokenizers")
    normalizers = {step["type"] for step in _in_order(parts["normalizer"], "normalizers")}
    if (
        parts["model"]["type"] != "BPE"
        or parts["model"].get("dropout")
        or not normalizers <= {"NFC"}
        or not any(step["type"] == "ByteLevel" for step in splitters)
        or any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in splitters)
        or any(map(_takes_more, added.values()))
    ):
        return None
    vocabulary = parts["model"]["vocab"].items()
    lengths = np.zeros(1 + max(chain(added, (number for _, number in vocabulary)), default=0), np.int64)
    for token, number in vocabulary:
        # The byte-level alphabet has a letter for each byte.
        lengths[number] = len(token)
    for number, token in added.items():
        lengths[number] = len(token.content.encode())
    return ByteLevelEncoder(backend, lengths, composes=bool(normalizers))


def _takes_more(token: AddedToken) -> bool:
    """Whether an added token is more than its letters, wherever they stand."""
    return token.lstrip or token.rstrip or token.single_word or token.normalized


def _in_order(step: Mapping[str, Any] | None, inner: str) -> Iterable[Mapping[str, Any]]:
    if step is None:
        return []
    return list(chain.from_iterable(_in_order(s, inner) for s in step[inner])) if step["type"] == "Sequence" else [step]
