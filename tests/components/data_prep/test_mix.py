from random import Random

import pytest

from finemill.components.data_prep.clean import Record
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.mix import apportion, mix_sources
from finemill.config import parse_config
from finemill.errors import UserError


def records(source: int, count: int, num_characters: int = 10) -> list[Record]:
    return [
        Record(source, n, f"{source}-{n}", "text", f"{source}-{n}".encode(), b"", num_characters, 0)
        for n in range(count)
    ]


def config(*weights: float | None, **fields: object) -> DataPrepConfig:
    sources = [{"uri": f"source{number}", "weight": weight} for number, weight in enumerate(weights)]
    return parse_config(DataPrepConfig, {"sources": sources, **fields}, "data-prep")


def counts(groups: dict[int, list[Record]], fields: DataPrepConfig, split: str = "train") -> list[int]:
    return [len(kept) for kept in mix_sources(groups, fields, split).values()]


def test_without_weights_all_rows_stay() -> None:
    assert counts({0: records(0, 3), 1: records(1, 50)}, config(None, None)) == [3, 50]


@pytest.mark.parametrize(
    ("have", "expected"), [((750, 250), [750, 250]), ((900, 50), [150, 50]), ((30, 900), [30, 10])]
)
def test_75_to_25_is_exact_by_leaving_out(have: tuple[int, int], expected: list[int]) -> None:
    assert counts({0: records(0, have[0]), 1: records(1, have[1])}, config(75, 25)) == expected


def test_the_preferred_rows_of_a_source_stay() -> None:
    rows = records(0, 100)
    assert mix_sources({0: rows, 1: records(1, 10)}, config(1, 1), "train")[0] == rows[:10]


def test_upsampling_repeats_training_rows_only() -> None:
    groups = {0: records(0, 60), 1: records(1, 8)}
    fields = config(75, 25, mix_policy="upsample")
    assert counts(groups, fields) == [60, 20]
    assert counts(groups, fields, "test") == [24, 8]


def test_proportions_by_characters_differ_by_less_than_a_row() -> None:
    groups = {0: records(0, 100, num_characters=300), 1: records(1, 500, num_characters=7)}
    kept = mix_sources(groups, config(3, 1, mix_by="characters"), "train")
    characters = [sum(record.num_characters for record in kept[source]) for source in (0, 1)]
    assert abs(characters[0] - 3 * characters[1]) < 300 + 3 * 7


def test_upsampling_by_characters_reaches_the_weights() -> None:
    groups = {0: records(0, 10, num_characters=100), 1: records(1, 2, num_characters=50)}
    assert counts(groups, config(1, 1, mix_by="characters", mix_policy="upsample")) == [10, 20]


def test_a_weighted_source_without_rows_is_an_error() -> None:
    with pytest.raises(UserError, match="source1: no row in the test split"):
        counts({0: records(0, 9)}, config(1, 1), "test")


def test_apportioned_numbers_add_up_and_are_next_to_their_shares() -> None:
    rng = Random(0)
    for _ in range(200):
        weights = [rng.uniform(0.1, 9) for _ in range(rng.randint(1, 6))]
        shares = {number: weight / sum(weights) for number, weight in enumerate(weights)}
        total = rng.randint(0, 1000)
        parts = apportion(total, shares)
        assert sum(parts.values()) == total
        assert all(abs(parts[number] - total * share) < 1 for number, share in shares.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_size": 0.5, "validation_size": 0.5}, "leave no training rows"),
        ({"sources": [{"uri": "a", "weight": 1}, {"uri": "b"}]}, "1 of 2 have a weight"),
        ({"min_characters": 9, "max_characters": 3}, "max_characters 3 is below min_characters 9"),
        ({"sources": []}, "'sources'"),
        ({"sources": [{"uri": "a", "ratio": 1}]}, r"unknown key 'sources.0.ratio'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(DataPrepConfig, {"sources": [{"uri": "a"}], **fields}, "data-prep")
