from collections.abc import Sequence
from contextlib import closing
from functools import partial
from random import Random

import pytest

from finemill.components.data_prep.benchmark import Benchmarks
from finemill.components.data_prep.clean import Cleaner
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.dedup import Deduplicator, NearDuplicates, sketch_of
from finemill.components.data_prep.index import RowIndex
from finemill.components.data_prep.read import UnreadRow
from finemill.components.data_prep.record import Record
from finemill.config import parse_config
from finemill.rows.reasons import DroppedRowError

WORDS = [f"word{number}" for number in range(500)]


def text_of(rng: Random, length: int = 60) -> list[str]:
    return [rng.choice(WORDS) for _ in range(length)]


def records(texts: Sequence[str], mode: str) -> tuple[DataPrepConfig, list[Record]]:
    config = parse_config(DataPrepConfig, {"sources": [{"uri": "a"}], "dedup": mode}, "data-prep")
    rows = [UnreadRow(len(text), partial(dict, text=text)) for text in texts]
    return config, Cleaner(0, config, Benchmarks(config)).clean(rows, first=1).records


def reason_of(dedup: Deduplicator, record: Record) -> str | None:
    try:
        dedup.check(record)
    except DroppedRowError as reason:
        return str(reason)
    return None


def test_a_repeated_row_names_the_one_that_it_repeats() -> None:
    config, (first, second) = records(["Hi", "hi"], "normalized")
    with closing(RowIndex()) as index:
        dedup = Deduplicator(config, index)
        dedup.check(first)
        with pytest.raises(DroppedRowError, match=r"^duplicate$") as repeated:
            dedup.check(second)
    assert repeated.value.field == "row 1"


def reasons(mode: str, *texts: str) -> list[str | None]:
    config, cleaned = records(texts, mode)
    with closing(RowIndex()) as index:
        dedup = Deduplicator(config, index)
        found = [reason_of(dedup, record) for record in cleaned]
        for record, reason in zip(cleaned, found, strict=True):
            if reason is None:
                index.add(record, offset=0)
        index.complete()
        near = {row for _, (_, row), _ in dedup.near_duplicates()}
    return [
        "near_duplicate" if record.number in near else reason for record, reason in zip(cleaned, found, strict=True)
    ]


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
        near.add(sketch_of(" ".join(words)))
        near.add(sketch_of(" ".join(other)))
        # The estimate has a standard deviation of 0.04.
        right += abs(overlap - 0.6) < 0.12 or near.repeats() == ({1: 0} if overlap >= 0.6 else {})
    assert right == 100


def test_texts_shorter_than_a_triple_are_compared_whole() -> None:
    assert reasons("minhash", "one two", "one three", "x") == [None, None, None]


CHINESE = (
    "\u6cb3\u6d41\u5728\u57ce\u5e02\u4e4b\u95f4\u7f13\u7f13\u5730\u6d41\u6dcc\u7740\u6e05"
    "\u6f88\u7684\u6c34\u58f0\u548c\u98ce\u4e00\u8d77\u5531\u6b4c\u76f4\u5230\u591c\u665a"
    "\u964d\u4e34"
)


def test_near_duplicates_are_found_in_scripts_without_spaces() -> None:
    """Word triples alone see such a text as one word, of which every other one is another."""
    changed = CHINESE * 2 + CHINESE.replace("\u57ce", "\u6751")
    other = "".join(Random(0).sample(CHINESE * 3, len(CHINESE) * 3))
    assert reasons("minhash", CHINESE * 3, changed, other) == [None, "near_duplicate", None]


def test_of_many_near_duplicates_the_first_stays_and_is_named() -> None:
    near, rng = NearDuplicates(threshold=0.8), Random(0)
    words = text_of(rng)
    for number in range(300):
        near.add(sketch_of(" ".join([*words[:59], f"end{number}"] if number % 3 else text_of(rng))))
    assert near.repeats() == {number: 1 for number in range(2, 300) if number % 3}
