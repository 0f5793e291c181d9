from contextlib import closing
from random import Random

import pytest

from finemill.components.data_prep.clean import Record, SourceCounts, Spool, clean_rows
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.dedup import Deduplicator, NearDuplicates
from finemill.config import parse_config
from finemill.rows.reasons import DroppedRowError

WORDS = [f"word{number}" for number in range(500)]


def text_of(rng: Random, length: int = 60) -> list[str]:
    return [rng.choice(WORDS) for _ in range(length)]


def reason_of(dedup: Deduplicator, record: Record, text: str) -> str | None:
    try:
        dedup.check(record, text)
    except DroppedRowError as reason:
        return str(reason)
    return None


def test_a_repeated_row_names_the_one_that_it_repeats() -> None:
    config = parse_config(DataPrepConfig, {"sources": [{"uri": "a"}]}, "data-prep")
    dedup = Deduplicator(config)
    with closing(Spool()) as spool:
        (first, text), (second, _) = clean_rows([{"text": "Hi"}, {"text": "hi"}], 0, config, spool, SourceCounts())
    dedup.check(first, text)
    with pytest.raises(DroppedRowError, match=r"^duplicate$") as repeated:
        dedup.check(second, text)
    assert repeated.value.field == "row 1"


def reasons(mode: str, *texts: str) -> list[str | None]:
    config = parse_config(DataPrepConfig, {"sources": [{"uri": "a"}], "dedup": mode}, "data-prep")
    dedup = Deduplicator(config)
    with closing(Spool()) as spool:
        cleaned = clean_rows(({"text": text} for text in texts), 0, config, spool, SourceCounts())
        return [reason_of(dedup, record, text) for record, text in cleaned]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [None, None, None, None]),
        ("exact", [None, "duplicate", None, None]),
        ("normalized", [None, "duplicate", "duplicate", None]),
    ],
)
def test_what_counts_as_repeated(mode: str, expected: list[str | None]) -> None:
    assert reasons(mode, "Add 2 * 3", "Add 2 * 3", "ADD  \uff12 * 3\n", "Add 2 + 3") == expected


def test_minhash_finds_a_changed_word_and_keeps_other_texts() -> None:
    words = text_of(Random(0))
    changed = [*words[:30], "other", *words[31:]]
    found = reasons("minhash", " ".join(words), " ".join(changed), " ".join(text_of(Random(1))))
    assert found == [None, "near_duplicate", None]


def test_minhash_decides_by_the_overlap_of_word_triples() -> None:
    rng = Random(0)
    right = 0
    for _ in range(100):
        words = text_of(rng)
        other = list(words)
        for position in rng.sample(range(60), rng.randint(0, 12)):
            other[position] = "changed"
        first, second = ({tuple(text[i : i + 3]) for i in range(58)} for text in (words, other))
        overlap = len(first & second) / len(first | second)
        near = NearDuplicates(threshold=0.6)
        near.seen(" ".join(words))
        # The estimate has a standard deviation of 0.04.
        right += abs(overlap - 0.6) < 0.12 or near.seen(" ".join(other)) == (overlap >= 0.6)
    assert right == 100


def test_texts_shorter_than_a_triple_are_compared_whole() -> None:
    assert reasons("minhash", "one two", "one three", "x") == [None, None, None]
