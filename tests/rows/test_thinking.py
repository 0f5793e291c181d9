import pytest

from finemill.rows.reasons import DroppedRowError
from finemill.rows.thinking import (
    bare_thinking,
    in_think_tags,
    split_thinking,
    switch_of,
    with_thinking,
    without_thinking,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>c", ("a\nb", "c")),
        ("<think>\na\n</think>\n\n    return x\n", ("a", "    return x\n")),
        ("a\n</think>\n\nc ", ("a", "c ")),
        ("<think>\n\n</think>\n\nc", ("", "c")),
        (" c\n", (None, " c\n")),
        ("I <think> so", (None, "I <think> so")),
        ("A block ends with </think> and so on.", (None, "A block ends with </think> and so on.")),
        ("Open it:\n<think>\nand close it:\n</think>\n", (None, "Open it:\n<think>\nand close it:\n</think>\n")),
        ("One\n</think>\nand two\n</think>\n", (None, "One\n</think>\nand two\n</think>\n")),
    ],
)
def test_thinking_is_split_from_the_answer_and_a_mention_is_not(text: str, expected: tuple[str | None, str]) -> None:
    assert split_thinking(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>hm", "unclosed_thinking"),
        *((text, "two_thinking_blocks") for text in (
            "<think>a</think>\n<think>b</think>c", "<think>\n<think>\na\n</think>b", "<think>a</think>\n</think>b",
            "<think>a\n<think>\nb</think>\nc</think>d")),
    ],
)  # fmt: skip
def test_a_block_that_does_not_end_or_is_doubled_is_refused(text: str, reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        split_thinking(text)


@pytest.mark.parametrize("text", ["a", "<think>a</think>", "\n<think>a", "a</think>", "<think>a</think>\n\nb"])
def test_a_block_that_stands_apart_may_have_its_tags(text: str) -> None:
    assert bare_thinking(text, "b") == "a"
    with pytest.raises(DroppedRowError, match=r"^two_thinking_blocks$"):
        bare_thinking("<think>a</think>c", "b")


def test_a_mention_of_the_tag_in_a_block_is_no_second_one() -> None:
    assert split_thinking("<think>The <think> tag opens it.</think>b") == ("The <think> tag opens it.", "b")


def test_thinking_is_taken_out_or_put_in_of_assistants_only() -> None:
    user = {"role": "user", "content": "<think>a</think>b"}
    assert without_thinking(user) == with_thinking(user) == user
    spoken = {"role": "assistant", "content": "b"}
    for thinking in ({"role": "assistant", "content": "<think>a</think>b"}, {**spoken, "reasoning_content": "a"}):
        assert without_thinking(thinking) == spoken
        assert with_thinking(thinking) == thinking
    assert with_thinking(spoken) == {**spoken, "reasoning_content": ""}


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("2+2? /no_think", False),
        ("2+2? /think\n", True),
        ("/no_think 2+2?", False),
        ("/think 2+2? /no_think", False),
        ("What does /no_think do?", None),
        ("see path/think", None),
        ("", None),
    ],
)
def test_a_switch_counts_at_an_end_of_the_question(question: str, asked: bool | None) -> None:
    assert switch_of(question) is asked


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nb\n\n<|end_of_solution|>",
            "<think>\na\n</think>\n\nb",
        ),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", "<think>\na\n</think>\n\nb"),
        ("[THINK]a[/THINK]b", "<think>\na\n</think>\n\nb"),
        (
            "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>",
            "<think>\na\n</think>\n\nb",
        ),
        (" The mark [THINK] opens it, [/THINK] ends it.", " The mark [THINK] opens it, [/THINK] ends it."),
    ],
)
def test_other_families_tags_are_read_as_thinking(content: str, expected: str) -> None:
    assert in_think_tags(content) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[THINK]a", "unclosed_thinking"), ("[THINK]a[/THINK]b[THINK]c[/THINK]", "two_thinking_blocks")],
)
def test_other_families_tags_end_and_stand_once(content: str, reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        in_think_tags(content)
