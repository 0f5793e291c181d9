import hashlib
from random import Random

import pytest

from finemill.components.data_prep.split import assign_split, order_key

KEYS = [hashlib.sha256(str(number).encode()).digest()[:16] for number in range(4000)]


@pytest.mark.parametrize(("test_size", "validation_size"), [(0.1, 0.2), (0.0, 0.5), (0.05, 0.0)])
def test_splits_have_about_their_sizes(test_size: float, validation_size: float) -> None:
    splits = [assign_split(key, test_size=test_size, validation_size=validation_size, seed=0) for key in KEYS]
    assert splits.count("test") / len(KEYS) == pytest.approx(test_size, abs=0.02)
    assert splits.count("validation") / len(KEYS) == pytest.approx(validation_size, abs=0.03)


def test_another_validation_size_leaves_test_as_it_was() -> None:
    def in_test(validation_size: float) -> list[bool]:
        return [assign_split(k, test_size=0.1, validation_size=validation_size, seed=3) == "test" for k in KEYS]

    assert in_test(0.0) == in_test(0.3)


def test_another_seed_splits_otherwise() -> None:
    first, second = (
        [assign_split(key, test_size=0.5, validation_size=0, seed=seed) for key in KEYS] for seed in (0, 1)
    )
    assert 0.4 < sum(a == b for a, b in zip(first, second, strict=True)) / len(KEYS) < 0.6


def test_the_order_of_rows_does_not_depend_on_other_rows() -> None:
    names = [str(number) for number in range(200)]
    ordered = sorted(names, key=lambda name: order_key(name, 0))
    some = Random(0).sample(names, 50)
    assert sorted(some, key=lambda name: order_key(name, 0)) == [name for name in ordered if name in some]
    assert ordered != names
