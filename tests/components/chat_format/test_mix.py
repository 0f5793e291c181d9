from random import Random

import numpy as np
import pytest

from finemill.artifacts.rows import Mix, MixBy, MixPolicy
from finemill.artifacts.splits import Split
from finemill.components.chat_format.mix import apportion, mix_examples
from finemill.errors import UserError


def mixed(
    *sizes: list[int],
    weights: tuple[float, ...],
    by: MixBy = "rows",
    policy: MixPolicy = "downsample",
    max_repeats: int = 4,
    split: Split = "train",
) -> list[list[int]]:
    """How often each example of each source is taken; the sources' examples stand in turn."""
    names = [f"source{number}" for number in range(len(weights))]
    mix = Mix(by=by, policy=policy, max_repeats=max_repeats, weights=dict(zip(names, weights, strict=True)))
    places = sorted((place, source) for source, own in enumerate(sizes) for place in range(len(own)))
    sources = np.array([source for _, source in places])
    values = np.array([1 if by == "rows" else sizes[source][place] for place, source in places])
    times = mix_examples(sources, values, names, mix, split)
    return [times[sources == number].tolist() for number in range(len(weights))]


@pytest.mark.parametrize(
    ("have", "expected"), [((750, 250), [750, 250]), ((900, 50), [150, 50]), ((30, 900), [30, 10])]
)
def test_75_to_25_is_exact_by_leaving_out(have: tuple[int, int], expected: list[int]) -> None:
    assert [sum(times) for times in mixed(*([1] * n for n in have), weights=(75, 25))] == expected


def test_the_first_examples_of_a_source_stay() -> None:
    assert mixed([1] * 100, [1] * 10, weights=(1, 1))[0] == [1] * 10 + [0] * 90


def test_upsampling_repeats_training_rows_only_and_not_too_often() -> None:
    def counts(**fields: object) -> list[int]:
        return [sum(times) for times in mixed([1] * 60, [1] * 8, weights=(75, 25), policy="upsample", **fields)]  # type: ignore[arg-type]

    assert counts() == [60, 20]
    assert counts(split="test") == [24, 8]
    assert counts(max_repeats=2) == [48, 16]
    assert mixed([1] * 60, [1] * 8, weights=(75, 25), policy="upsample")[1] == [3] * 4 + [2] * 4


@pytest.mark.parametrize("by", ["tokens", "learned_tokens"])
def test_shares_by_tokens_differ_by_less_than_a_row(by: MixBy) -> None:
    rng = Random(0)
    for _ in range(100):
        sizes = [[rng.randint(1, 300) for _ in range(rng.randint(20, 200))] for _ in range(3)]
        weights = tuple(rng.uniform(0.5, 5) for _ in range(3))
        times = mixed(*sizes, weights=weights, by=by)
        amounts = [
            sum(n * size for n, size in zip(own, have, strict=True)) for own, have in zip(times, sizes, strict=True)
        ]
        for amount, weight in zip(amounts, weights, strict=True):
            total = max(amount / weight for amount, weight in zip(amounts, weights, strict=True))
            assert abs(amount - weight * total) < 300


def test_the_policy_error_takes_all_or_ends_the_run() -> None:
    assert mixed([1] * 75, [1] * 25, weights=(3, 1), policy="error") == [[1] * 75, [1] * 25]
    with pytest.raises(UserError, match=r"shares by rows are source0 50.0% instead of 75.0%, source1 50.0% instead of"):
        mixed([1] * 50, [1] * 50, weights=(3, 1), policy="error")


def test_a_weighted_source_without_rows_is_an_error() -> None:
    with pytest.raises(UserError, match=r"source1: no row in the test split, .* raise test_size, or set it to 0"):
        mixed([1] * 9, [], weights=(1, 1), split="test")


def test_apportioned_numbers_add_up_and_are_next_to_their_shares() -> None:
    rng = Random(0)
    for _ in range(200):
        weights = np.array([rng.uniform(0.1, 9) for _ in range(rng.randint(1, 6))])
        total = rng.randint(0, 1000)
        parts = apportion(total, weights / weights.sum())
        assert parts.sum() == total
        assert (np.abs(parts - total * weights / weights.sum()) < 1).all()
