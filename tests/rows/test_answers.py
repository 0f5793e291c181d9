import pytest

from finemill.rows.answers import final_answer, find_answer, with_opening


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n2 + 2 = 4\n</think>\n\nThe answer is \\boxed{4} apples.", "4"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"),
        (r"\boxed{\boxed{7}}", "7"),
        ("Natalia sold 48 + 24 = 72 clips.\n#### 1,072", "1072"),
        ("The answer is 7.0.", "7"),
        ("The answer is 033.", "33"),
        ("So 3 of 12 remain", "12"),
        ("no number at all", None),
        ("<think>\nstill thinking about 5", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 3/4", "3/4"),
        ("a loss\n#### -$5", "-5"),
        ("a share\n#### 2 3/4", "2 3/4"),
        ("#### 18 dollars", "18 dollars"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is .5", "0.5"),
        ("It starts at 12:30.", "12:30"),
        ("Light takes 3 \\times 10^8 m/s", r"3 \times 10^8 m/s"),
        ("The probability is $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("\\[\nx = \\frac{3}{4}\n\\]\nThat is all.", r"\frac{3}{4}"),
        ("The line is y = 3x + 2", "3x + 2"),
        ("The solutions are 1 and 2.", "1 and 2"),
        ("The answer is between 5 and 6", "5 and 6"),
        ("Hence n = 12 and m = 5", "n = 12 and m = 5"),
        ("The point is (3, -4).", "(3, -4)"),
        ("The interval is [1, 2)", "[1, 2)"),
        ("It takes 2 and a half hours", "2 and a half"),
        ("There are 5 million.", "5 million"),
        ("It is \N{MINUS SIGN}5 degrees.", "-5 degrees"),
        ("It is 5\N{VULGAR FRACTION ONE HALF}", "5 1/2"),
        ("There are 1 000 000", "1 000 000"),
    ],
)
def test_a_piece_of_an_answer_is_not_the_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5 + 3 = 8.", "8"),
        ("In total 10 - 5 = 5 apples", "5"),
        ("The answer is 5 apples + 3 apples = 8 apples.", "8"),
        ("The answer is 72 clips, altogether.", "72"),
        ("He buys it for $5 and sells it for $8.", "8"),
        ("**Answer:** 42", "42"),
        ("Answer: Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72", "72"),
        ("#### Step 2\nWe add.\n#### 5. Conclusion\nThe total is 42", "42"),
        ("#### Final answer\n42", "42"),
        ("#### The total is 42", "42"),
        ("(2 red + 2 new) / 10 balloons = 40%", "40%"),
        ("\u7b54\u6848\u662f\uff15\u4e2a", "5"),
        ("- 5 apples", "5"),
        ("The answer is B because 5 > 3", "B"),
        ("The correct answer is (B) 12.", "B"),
        ("The answer is Paris.", "Paris"),
    ],
)  # fmt: skip
def test_an_answer_is_found_in_its_sentence(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["So the total is \\boxed{1", "\\boxed{4} or rather \\boxed{1", "It is not 5."])
def test_what_was_cut_or_denied_is_no_answer(text: str) -> None:
    assert find_answer(text) is None


def test_a_thinking_block_that_the_prompt_opened_is_one() -> None:
    prompt = "<|im_start|>assistant\n<think>\n"
    assert final_answer(with_opening(prompt, "6 * 7 = 42. But wait")) is None
    assert final_answer(with_opening(prompt, "6 * 7 = 42\n</think>\n\nIt is 42.")) == "42"
    assert final_answer(with_opening("Answer in <think> marks.\nassistant\n", "42")) == "42"


def test_a_mark_that_an_answer_speaks_of_opens_no_block() -> None:
    assert final_answer("Models write `<think>` first. The answer is 42.") == "42"
    assert final_answer("<think>hm</think>Write <think> first. The answer is 42.") == "42"
    assert final_answer("<think>hm</think>\n<think>The answer is 42.") is None


def test_equal_numbers_are_spelled_alike() -> None:
    spellings = ("1000", "1,000", " $1000$ ", "1000.", "1000.00", "+1000", "1{,}000", r"1,\!000", r"\$1000")
    assert {final_answer(f"\\boxed{{{text}}}") for text in spellings} == {"1000"}
