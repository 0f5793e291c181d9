from finemill.components.chat_format.packing import num_packs, packing


def test_packs_are_filled_with_the_longest_that_fits() -> None:
    assert num_packs([5, 5, 4, 4, 1, 1], 10) == 2
    assert num_packs([], 10) == 0
    assert packing([8, 2, 2], 8) == {
        "max_length": 8,
        "padding_in_batches_of_8": 0.5,
        "padding_packed": 0.25,
        "sequences_per_pack": 1.5,
    }
    assert packing([], 8) == {}
