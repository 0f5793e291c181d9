"""Likeness in the world's scripts, against values computed by hand."""

from random import Random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from finemill.metrics.text import bleu, chrf, rouge_scores, tokenizer_for, words

TEXTS = {
    "en": ("London is the capital of England.", "13a"),
    "fr": ("Paris est la capitale de la France, célèbre pour ses cafés.", "13a"),
    "ru": ("Москва - столица России.", "intl"),
    "hi": ("दिल्ली भारत की राजधानी है।", "intl"),
    "ar": ("القاهرة عاصمة مصر.", "intl"),
    "ko": ("서울은 한국의 수도입니다.", "intl"),
    "zh": ("北京是中国的首都\uff0c历史悠久。", "zh"),
    "ja": ("東京は日本の首都です。", "char"),
    "th": ("กรุงเทพเป็นเมืองหลวง", "char"),
    "signs": ("!!! 😀", "intl"),
}  # fmt: skip


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_is_wholly_like_itself_and_not_like_another(language: str) -> None:
    text, tokenizer = TEXTS[language]
    other = "zzz qqq"
    assert tokenizer_for(text) == tokenizer
    assert set(rouge_scores(text, text).values()) <= {1.0, 0.0}
    assert rouge_scores(text, text)["rougeL"] == 1.0
    assert (bleu(text, text), chrf(text, text)) == (pytest.approx(1.0), pytest.approx(1.0))
    assert rouge_scores(text, other)["rougeL"] == 0.0
    assert max(bleu(text, other), chrf(text, other)) < 0.1


def test_part_of_a_chinese_sentence_counts_in_part() -> None:
    # 4 of 4 characters found, 4 of 6 covered.
    assert rouge_scores("今天天气很好", "天气很好")["rougeL"] == pytest.approx(2 * 4 / 10)


def test_rouge_has_the_words_of_the_definition() -> None:
    # Common subsequence "police the" or "the gunman", 2 of 4 words on both sides.
    assert rouge_scores("police killed the gunman", "the gunman killed police")["rougeL"] == pytest.approx(0.5)
    assert words("Don't STOP: 1,000 cafés!", "13a") == ["don", "t", "stop", "1,000", "cafés"]


def test_bleu_is_the_geometric_mean_of_precisions() -> None:
    # Words 5/6, pairs 3/5, triples 1/4, fours 0 of 3, smoothed to 1/(2 * 3): equal lengths, no penalty.
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert bleu("the cat sat on the mat", "the cat sits on the mat") == pytest.approx(expected)


@pytest.mark.parametrize(("reference", "prediction"), [("a text", ""), ("", "a text"), ("", "")])
def test_an_empty_text_is_like_nothing(reference: str, prediction: str) -> None:
    assert (bleu(reference, prediction), chrf(reference, prediction)) == (0.0, 0.0)
    assert rouge_scores(reference, prediction)["rougeL"] == 0.0


def test_rouge_l_is_that_of_rouge_score() -> None:
    random = Random(0)
    scorer = RougeScorer(["rougeL"])
    for _ in range(200):
        one, other = (" ".join(random.choices("abcde", k=random.randint(1, 20))) for _ in range(2))
        assert rouge_scores(one, other)["rougeL"] == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)
