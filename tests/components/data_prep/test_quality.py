import pytest

from finemill.components.data_prep.quality import advice_for, flags_of
from finemill.rows.shapes import detect_shape, to_conversation

LONG = "".join(
    f"This is sentence {number} of an answer that is long enough to be one that was cut. " for number in range(4)
)
LOOP = "And so it goes on and on. " * 4
CHINESE = (
    "\u8fd9\u662f\u4e00\u4e2a\u5173\u4e8e\u57ce\u5e02\u548c\u6cb3\u6d41\u7684\u95ee\u9898"
    "\u8bf7\u7528\u4e2d\u6587\u56de\u7b54\u8c22\u8c22\u4f60"
)


@pytest.mark.parametrize(
    ("question", "answer", "flags"),
    [
        ("What is 2 + 2?", "It is 4.", []),
        ("Hi", "I\u2019m sorry, but I can\u2019t help with that.", ["refusal"]),
        ("Hi", "I cannot assist with this request.", ["refusal"]),
        ("Hi", "As an AI language model, I have no body.", ["refusal"]),
        ("Hi", "Sorry to hear that! I can help.", []),
        ("Hi", LONG + "And then the", ["truncated_answer"]),
        ("Hi", LONG.strip(), []),
        ("Hi", "This sentence was cut off in the middle of the", ["truncated_answer"]),
        ("Hi", "Neither Ann nor Bob knows what they are looking at", []),
        ("Hi", f"First. {LOOP}", ["repetition"]),
        ("Hi", LOOP.replace(". ", ",\n"), ["repetition"]),
        (LOOP, "Yes.", []),
        ("Hi", "- 1\n- 1\n- 1\n- 1\n" * 5, []),
        ("Hi", "Dear [Your Name], thanks.", ["placeholder"]),
        ("Hi", "Lorem ipsum dolor.", ["placeholder"]),
        ("x = [name, value]; what is it?", "A list.", []),
        ("Stra\u00c3\u009fe?", "A street.", ["damaged_encoding"]),
        ("Stra\u00dfe?", "A street \u2013 yes.", []),
        ("Hi", "Done.</s>", ["control_tokens"]),
        ("[INST] Hi [/INST]", "Done.", ["control_tokens"]),
        ("[inst] Hi <End_Of_Turn>", "Done <|IM_END|>", ["control_tokens"]),
        ("Hi", "todo: <insert name>, {{ name }}", ["placeholder"]),
        (CHINESE, "The city lies on a river, as you may know.", ["language_mix"]),
        (CHINESE, CHINESE, ["repeated_turn"]),
        ("Is this a question that is long?", "Is this a question that is long?", ["repeated_turn"]),
    ],
)
def test_doubtful_rows_are_named(question: str, answer: str, flags: list[str]) -> None:
    row = {"prompt": question, "completion": answer}
    assert flags_of(to_conversation(row, str(detect_shape(row)))) == flags


def test_documents_are_looked_at_for_marks_and_damage_only() -> None:
    assert flags_of(to_conversation({"text": "TODO <|im_end|>"}, "text")) == ["control_tokens"]


@pytest.mark.parametrize(("rows", "said"), [(99, "collect"), (299, "300 rows"), (999, "about 1000"), (1000, None)])
def test_small_training_sets_come_with_advice(rows: int, said: str | None) -> None:
    advice = advice_for(rows)
    assert advice is None if said is None else said in str(advice)
