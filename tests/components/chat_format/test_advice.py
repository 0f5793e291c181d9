from collections import Counter
from typing import Any

import pytest

from finemill.components.chat_format.advice import advice_on
from finemill.components.chat_format.config import ChatFormatConfig


class Counts:
    """What the advice asks of the counts."""

    def __init__(self, **numbers: Any) -> None:
        self.examples = numbers.get("examples", 1000)
        self.truncated = numbers.get("truncated", 0)
        self.thinking = numbers.get("thinking", 0)
        self.read = Counter({"a": 1000})
        self.rows_dropped = Counter({"too_long": numbers.get("too_long", 0)})


@pytest.mark.parametrize(
    ("numbers", "padding", "own", "said"),
    [
        ({}, 0.1, True, []),
        ({"examples": 200}, 0.1, True, []),
        ({"examples": 200}, 0.1, False, ["no chat template of its own"]),
        ({"too_long": 120}, 0.1, True, ["120 of 1000 rows (12%) are longer than max_length 2048"]),
        ({"too_long": 20}, 0.1, True, []),
        ({"truncated": 50}, 0.1, True, ["50 of 1000 examples (5%) are cut"]),
        ({}, 0.5, True, ["50% of batches of eight would be padding"]),
        ({"thinking": 20}, 0.1, True, ["Only 20 of 1000 examples think"]),
        ({"thinking": 500}, 0.1, True, []),
    ],
)
def test_advice_is_given_where_there_is_something_to_say(
    numbers: dict[str, int], padding: float, own: bool, said: list[str]
) -> None:
    counts: Any = Counts(**numbers)
    found = list(advice_on(counts, ChatFormatConfig(), padding, size=None, has_own_template=own))
    assert len(found) == len(said)
    assert all(words in sentence for words, sentence in zip(said, found, strict=True))


def test_what_data_prep_says_of_the_size_comes_first() -> None:
    counts: Any = Counts(too_long=100)
    first, second = advice_on(counts, ChatFormatConfig(), 0.0, size="20 training rows: few", has_own_template=True)
    assert first == "20 training rows: few"
    assert "max_length" in second
