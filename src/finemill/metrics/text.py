"""Likeness of a text to its reference, in any language: ROUGE, BLEU and chrF, each for one pair of texts.

BLEU's words are those of the SacreBLEU tokenizer for the reference's script, and ROUGE's the same without case and
punctuation: rouge-score's own keep nothing but a to z and digits.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

Tokenizer = Literal["13a", "intl", "zh", "char"]

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# Thai, Lao, Tibetan, Burmese, Khmer and the syllables of Japanese: written without spaces between words.
_WITHOUT_SPACES = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
_ONLY_LATIN = re.compile("[\u0000-\u024f\u2000-\u206f]*")


def tokenizer_for(text: str) -> Tokenizer:
    """The SacreBLEU tokenizer for the script that `text` is written in.

    `13a`, that of WMT, for Latin letters; `zh` for Chinese; `char` where words are not parted by spaces, Japanese too,
    whose `ja-mecab` needs a dictionary; `intl` for all others.
    """
    if re.search(f"[{_WITHOUT_SPACES}]", text):
        return "char"
    if re.search(f"[{_HAN}]", text):
        return "zh"
    return "13a" if _ONLY_LATIN.fullmatch(text) else "intl"


def words(text: str, tokenizer: Tokenizer) -> list[str]:
    """Words without case and punctuation; of a text that is nothing but punctuation, all of it."""
    tokens = _tokenize(text.casefold(), "intl" if tokenizer == "13a" else tokenizer).split()
    return [token for token in tokens if any(character.isalnum() for character in token)] or tokens


def rouge_scores(reference: str, prediction: str) -> Mapping[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming (Lin, 2004)."""
    reference, prediction = _normal(reference), _normal(prediction)
    tokenizer = tokenizer_for(reference)
    right, said = (words(text, tokenizer) for text in (reference, prediction))
    scores = _rouge_scorer().score(" ".join(right), " ".join(said))
    common = _common_length(right, said)
    longest = 2 * common / (len(right) + len(said)) if common else 0.0
    return {**{name: float(score.fmeasure) for name, score in scores.items()}, "rougeL": longest}


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit per word of `one` (Hyyrö, Bit-parallel LCS-length, 2004).

    rouge-score's own table takes a minute for two texts of 16,000 words.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(one)) - 1
    left = everywhere
    for word in other:
        met = left & places.get(word, 0)
        left = (left + met | left - met) & everywhere
    return len(one) - left.bit_count()


def bleu(reference: str, prediction: str) -> float:
    """Sentence BLEU, 0 to 1, over the orders that the prediction is long enough for (SacreBLEU, `exp` smoothing).

    The mean over rows is not the corpus BLEU of a paper, which has no error per row.
    """
    if not prediction.strip() or not reference.strip():
        return 0.0
    reference, prediction = _normal(reference), _normal(prediction)
    return float(_bleu(tokenizer_for(reference)).sentence_score(prediction, [reference]).score) / 100


def chrf(reference: str, prediction: str) -> float:
    """Sentence chrF, 0 to 1: F2 of characters in groups of one to six, spaces left out (Popović, 2015)."""
    if not prediction.strip() or not reference.strip():
        return 0.0
    return float(_chrf().sentence_score(_normal(prediction), [_normal(reference)]).score) / 100


def _normal(text: str) -> str:
    """Composed: a letter with its accent is one sign, however it was typed."""
    return unicodedata.normalize("NFC", text)


class _Spaces:
    """The tokenizer that rouge-score asks for, of texts that are words already."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2"], tokenizer=_Spaces())


@cache
def _bleu(tokenizer: Tokenizer) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def _tokenize(text: str, tokenizer: Tokenizer) -> str:
    return str(_bleu(tokenizer).tokenizer(text))
