import json
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from finemill.components.chat_format.byte_level import byte_level_encoder
from finemill.components.chat_format.mask import label_tokens
from tests.components.chat_format.conftest import ALPHABET, BASE

SOURCE = (BASE / "tokenizer.json").read_text(encoding="utf-8")
BACKEND = Tokenizer.from_str(SOURCE)
PARTS: dict[str, Any] = json.loads(SOURCE)
PIECES = (
    *ALPHABET,
    "<think>",
    "</tool_call>",
    "<|im_start|>user\n",
    "\u212b",
    "\uac01",
    "\u1112\u1161\u11ab",
    "don't",
    "  12",
)


def texts(number: int) -> list[str]:
    rng = Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 15))) for _ in range(number)]


def test_ids_and_labels_are_those_of_the_whole_text_with_its_offsets() -> None:
    encoder, rng, found = byte_level_encoder(BACKEND, PARTS), Random(1), 0
    assert encoder is not None
    for text, tokens in zip(texts(500), encoder.encode(texts(500)), strict=True):
        whole = BACKEND.encode(text, add_special_tokens=False)
        if tokens is None:
            continue
        found += 1
        assert tokens.input_ids.tolist() == whole.ids
        edges = sorted(rng.choices(range(len(text) + 1), k=4))
        spans = [(edges[0], edges[1]), (edges[2], edges[3])]
        spans = [(start, end) for start, end in spans if start < end]
        offsets = np.array(whole.offsets, np.int64).reshape(-1, 2)
        expected = label_tokens(tokens.input_ids, offsets, spans)
        assert label_tokens(tokens.input_ids, tokens.offsets, tokens.places(text, spans)).tolist() == expected.tolist()
    assert found > 250


def test_a_text_that_the_tokenizer_composes_is_left_to_it() -> None:
    encoder = byte_level_encoder(BACKEND, PARTS)
    assert encoder is not None
    assert encoder.encode(["e\u0301"]) == [None]


@pytest.mark.parametrize(
    "changed",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "Unigram"}},
    ],
)
def test_a_tokenizer_of_another_kind_has_none(changed: dict[str, Any]) -> None:
    assert byte_level_encoder(BACKEND, {**PARTS, **changed}) is None
