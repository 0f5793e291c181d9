from typing import Any

import pytest

from finemill.rows.learned import says_learned
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation

Row = dict[str, Any]


def turns(*flags: Row) -> list[Row]:
    """A question and an answer for each of the flags, which the answer has."""
    pairs = [({"role": "user", "content": "a?"}, {"role": "assistant", "content": "A.", **flag}) for flag in flags]
    return [turn for pair in pairs for turn in pair]


def read(row: Row) -> Any:
    return to_conversation(row, detect_shape(row) or "")


def learned(row: Row) -> list[bool]:
    """Whether each answer is learned."""
    return [m.get("weight") != 0 for m in read(row).messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0}, {"weight": "0.0"}, {"weight": -1}, {"train": False}, {"loss": "no"}, {"sft_weight": 0},
        {"is_trainable": "False"}, {"do_train": False}, {"learnable": False}, {"loss_mask": 0}, {"assistant_mask": 0},
        {"mask": True}, {"masked": 1}, {"is_ignored": True}, {"no_loss": True}, {"skip_training": True},
        {"no_grad": True},
        {"isTrainable": False}, {"label": False}, {"is_correct": False}, {"is_rejected": True},
        {"rating": 5, "weight": 0}, {"untrained": True}, {"grad": False}, {"context_only": True}, {"upvote": 0},
        {"labels": False},
    ],
)  # fmt: skip
def test_a_turn_that_its_data_exclude_is_context(flag: Row) -> None:
    assert learned({"messages": turns(flag, {})}) == [False, True]


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": None}, {"weight": 1}, {"train": True}, {"mask": False}, {"label": True}, {"constraint": False},
        {"non_english": True}, {"masking_tape": True}, {"trainer": 0}, {"weightless": 0}, {"label": "sports"},
        {"train_id": 0}, {"training_step": 0}, {"loss_value": 0}, {"mask_type": 1},
    ],
)  # fmt: skip
def test_other_flags_leave_a_turn_learned(flag: Row) -> None:
    assert learned({"messages": turns(flag, {})}) == [True, True]


def test_a_weight_between_0_and_1_is_named_as_not_read() -> None:
    conversation = read({"messages": turns({"weight": 0.5}, {})})
    assert list(conversation.unread) == ["messages[].weight"]


@pytest.mark.parametrize(
    "name", ["loss_mask", "weights", "train_mask", "turn_weights", "loss_weights", "assistant_masks", "trainable"]
)
@pytest.mark.parametrize("flags", [[0, 0, 0, 1], [False, True], [0.0, 1.0], "[0, 0, 0, 1]", ["false", "true"]])
def test_a_list_of_flags_beside_the_turns_says_which_are_learned(name: str, flags: Any) -> None:
    conversation = read({"messages": turns({}, {}), name: flags})
    assert [m.get("weight") for m in conversation.messages if m["role"] == "assistant"] == [0, None]
    assert list(conversation.unread) == []


@pytest.mark.parametrize("name", ["mask", "turn_mask", "masks", "learn_mask", "prompt_mask"])
@pytest.mark.parametrize("flags", [[0, 0, 0, 1], [1, 1, 1, 0]])
def test_of_a_mask_what_the_questions_have_is_not_learned(name: str, flags: list[int]) -> None:
    assert learned({"messages": turns({}, {}), name: flags}) == [False, True]


@pytest.mark.parametrize("name", ["mask", "is_masked", "excluded", "ignore"])
def test_a_list_of_masks_says_which_turns_are_not_learned(name: str) -> None:
    assert learned({"messages": turns({}, {}), name: [1, 1, 1, 0]}) == [False, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": turns({}, {}), "loss_mask": [0, 0, 0, 0]}, "excluded_row"),
        ({"messages": turns({}, {}), "loss_mask": [0, 1, 1]}, "partly_excluded_row"),
        ({"messages": turns({}, {}), "train_turns": [3]}, "partly_excluded_row"),
        ({"prompt": "a", "completion": "b", "weights": [0, 0]}, "excluded_row"),
        ({"prompt": "a", "completion": "b", "loss_mask": [1, 1, 0, 1, 1]}, "partly_excluded_row"),
    ],
)
def test_lists_that_exclude_every_answer_or_fit_no_turns_leave_the_row_out(row: Row, reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        read(row)


@pytest.mark.parametrize("name", ["train_on_last_only", "last_turn_only", "only_last", "loss_on_final_only"])
def test_a_column_may_say_that_only_the_last_answer_is_learned(name: str) -> None:
    assert learned({"messages": turns({}, {}), name: True}) == [False, True]
    assert learned({"messages": turns({}, {}), name: False}) == [True, True]


def test_lists_of_other_names_or_of_other_values_are_only_not_read() -> None:
    row = {"messages": turns({}, {}), "labels": [0, 1], "weights": [0.1, 0.9], "train": ["a", "b"]}
    assert learned(row) == [True, True]
    assert list(read(row).unread) == ["labels", "weights", "train"]


def test_a_name_says_what_is_learned_what_is_not_or_nothing() -> None:
    said = {name: says_learned(name) for name in ("loss_mask", "mask", "train", "no_train", "Trainable", "score")}
    assert said == {
        "loss_mask": True,
        "mask": False,
        "train": True,
        "no_train": False,
        "Trainable": True,
        "score": None,
    }
