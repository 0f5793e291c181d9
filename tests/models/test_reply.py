import pytest

from finemill.models.reply import End, Piece, Reply, ThinkingSplitter, collect

TEXT = "<think>\n1 + 1 < 3\n</think>\n\nIt is 2, not <3."


def split(text: str, size: int, *, opened: bool = False) -> list[Piece]:
    splitter = ThinkingSplitter(opened=opened)
    pieces = [piece for start in range(0, len(text), size) for piece in splitter.add(text[start : start + size])]
    return [*pieces, *splitter.close()]


def joined(pieces: list[Piece], *, thinking: bool) -> str:
    return "".join(piece.text for piece in pieces if piece.thinking is thinking)


@pytest.mark.parametrize("size", range(1, len(TEXT) + 1))
def test_thinking_is_told_from_the_answer_whatever_the_pieces(size: int) -> None:
    pieces = split(TEXT, size)
    assert joined(pieces, thinking=True) == "1 + 1 < 3\n"
    assert joined(pieces, thinking=False) == "It is 2, not <3."


def test_a_block_that_the_prompt_opened_is_thinking() -> None:
    pieces = split("so\n</think>\n\nYes.", 3, opened=True)
    assert (joined(pieces, thinking=True), joined(pieces, thinking=False)) == ("so\n", "Yes.")


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
        ("<|channel>thought\n", "<channel|>"),
        ("<unused94>thought\n", "<unused95>"),
        ("<unused94>", "<unused95>"),
    ],
)
def test_the_marks_of_other_families_are_told_too(opening: str, closing: str, size: int) -> None:
    pieces = split(f"{opening}a [b] <c>{closing}\n[d] <e>", size)
    assert (joined(pieces, thinking=True), joined(pieces, thinking=False)) == ("a [b] <c>", "[d] <e>")


def test_a_beginning_of_a_mark_at_the_end_is_text() -> None:
    assert joined(split("a <thi", 2), thinking=False) == "a <thi"


def test_an_answer_that_was_cut_inside_its_thinking_says_nothing() -> None:
    assert collect([*split("<think>\n1 +", 2), End(finished=False, num_tokens=4)]) == Reply("1 +", "", False, 4)


def test_a_block_that_only_closes_is_no_answer() -> None:
    assert collect([*split("5\n</think>\n\nYes.", 4), End(finished=True)]) == Reply("5", "Yes.", True, None)
