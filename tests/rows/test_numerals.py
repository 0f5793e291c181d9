"""Spelled numbers, and words that only look like them."""

import pytest

from finemill.rows.numerals import in_digits, last_counted, signs_in_digits

SPELLED = {
    "十二": "12", "一百零五": "105", "一百五": "150", "二十一个": "21个", "一万二": "12000", "三亿五千万": "350000000",
    "二零二四": "2024", "负五": "-5", "二分之一": "1/2", "百分之五十": "50%", "三点一四": "3.14", "1.5万元": "15000元",
    "3億5000万円": "350000000円", "正负5": r"\pm 5",
    "three": "3", "twenty-one apples": "21 apples", "one hundred and five": "105", "three quarters": "3/4",
    "a half": "1/2", "two and a half hours": "2 1/2 hours", "two dozen": "24", "minus five": "-5", "negative $5": "-$5",
    "one thousand two hundred thirty-four": "1234",
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
def test_a_spelled_number_is_its_digits(text: str) -> None:
    assert in_digits(text) == SPELLED[text]


@pytest.mark.parametrize("text", ["a dog", "oneself", "tenant", "halfway", "and", "twenty-first", "Paris", ""])
def test_other_words_stay(text: str) -> None:
    assert in_digits(text) == text


def test_running_text_keeps_what_may_be_no_number() -> None:
    assert signs_in_digits("我们一起去了3万公里") == "我们一起去了30000公里"
    assert last_counted("一共有十二个苹果。我们一起算") == "12"
    assert last_counted("我们一起算") is None
