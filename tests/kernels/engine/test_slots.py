"""Slots take batches that were never seen, and waste little."""

import pytest

from finemill.kernels.engine.slots import choose_slots, round_counts, takes
from finemill.kernels.ops.packing import Classes, LengthClass


def classes(*runs: tuple[int, int, int]) -> Classes:
    return tuple(LengthClass(*run) for run in runs)


def test_a_batch_goes_into_the_tightest_slots_that_take_it() -> None:
    tight, wide = classes((0, 3, 256)), classes((0, 4, 512))
    assert choose_slots([200, 100], [wide, tight]) == tight
    assert choose_slots([400, 400, 300], [wide, tight]) == wide


def test_spare_slots_of_a_longer_class_take_shorter_sequences() -> None:
    slots = classes((0, 2, 1024), (2, 4, 256))
    assert takes(slots, [900, 200, 200, 200])
    assert takes(slots, [])
    assert not takes(slots, [900, 800, 257])
    assert not takes(slots, [1, 1, 1, 1, 1])


def test_new_slots_also_take_what_known_ones_do() -> None:
    known = classes((0, 1, 1024), (1, 5, 256))
    lengths = [700, 700, 100]
    slots = choose_slots(lengths, [known])
    assert slots != known
    assert takes(slots, lengths)
    assert takes(slots, [1024, 256, 256, 256, 256])


def test_slots_far_wider_than_the_batch_are_left_to_others() -> None:
    assert choose_slots([200], [classes((0, 8, 2048))]) == ((0, 1, 256),)


@pytest.mark.parametrize(("count", "rounded"), [(5, 6), (6, 6), (33, 48)])
def test_classes_have_as_many_slots_as_there_are_kernels_for(count: int, rounded: int) -> None:
    counted = round_counts(classes((0, count, 512), (count, count + 1, 256)))
    assert counted == ((0, rounded, 512), (rounded, rounded + 1, 256))
