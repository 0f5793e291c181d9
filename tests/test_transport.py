import base64
import json
import zlib
from typing import Any

import pytest

from finemill.errors import UserError
from finemill.transport import decode_text, pack_for_kfp, pack_long, unpack

FIELDS: dict[str, Any] = {
    "prompt": "Put it in $$\\boxed{}$$, the price is $5, see $(HOME).",
    "template": "{{ messages }} and {{=1+1}}",
    "pipe": "a | b 'c' \"d\" é\n",
    "max_length": None,
    "seed": 2**53 + 1,
    "nested": [{"text": "$(AWS_SECRET_ACCESS_KEY)"}, 1, 2.5, True],
    "keys": {"$$": 1},
    "looks_packed": "packed:abc",
    "looks_encoded": "base64:abc",
    "long": [f"part-{number}.jsonl" for number in range(1500)],
    "plain": {"lora_r": 16},
}


@pytest.mark.parametrize("pack", [pack_for_kfp, pack_long])
def test_what_is_packed_comes_back_to_the_letter(pack: Any) -> None:
    assert unpack(json.loads(json.dumps(pack(FIELDS)))) == FIELDS
    assert len(json.dumps(pack(FIELDS)["long"])) < 8000


def test_nothing_that_an_engine_would_change_is_left_for_kfp() -> None:
    packed = pack_for_kfp(FIELDS)
    text = json.dumps(packed)
    assert "$" not in text
    assert "{{" not in text
    assert "null" not in text
    assert packed["plain"] == FIELDS["plain"]
    assert unpack(pack_for_kfp("s3://b/$(NAME)")) == "s3://b/$(NAME)"


DEEP = zlib.compress(b"[" * 100_000)


@pytest.mark.parametrize(
    "text",
    ["packed:", "packed:????", *(f"packed:{base64.b64encode(data).decode()}" for data in (b"no zlib", DEEP))],
)
def test_what_cannot_be_unpacked_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack({"system_prompt": text})


def test_text_behind_the_mark_is_decoded_and_other_text_stays() -> None:
    assert decode_text("base64:" + base64.b64encode("é $(X)".encode()).decode()) == "é $(X)"
    assert decode_text("s3://bucket/base64") == "s3://bucket/base64"
    with pytest.raises(UserError, match="not UTF-8 in base64"):
        decode_text("base64:é")
