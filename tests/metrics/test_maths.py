"""What is equal, and what only looks so: pairs from the trackers of evaluation tools and tricks on them."""

from collections.abc import Sequence

import pytest

from finemill.artifacts.evaluation import Outcome
from finemill.metrics.maths import equal_answers, judge

RIGHT: dict[str, Sequence[str]] = {
    "1/2": ("0.5", r"\frac{1}{2}", r"\frac12", r"\dfrac{2}{4}", "50%", ".5", "\N{VULGAR FRACTION ONE HALF}"),
    "0.5": (r"\frac{1}{2}", "1/2", r"50\%"),
    "-1/2": (r"-\frac{1}{2}", r"\frac{-1}{2}", "\N{MINUS SIGN}0.5"),
    "210": ("210/week", "210 per week"),
    "18": (r"18\text{ dollars}", r"\$18", "$18.00", "18 dollars", r"18 \mathrm{m}", "(B) 18", "\uff118"),
    "33": ("033", "+33", "33.0", "$33$."),
    "033": ("33",),
    "1000": ("1{,}000", "1,000", r"1,\!000", "1 000", "1 thousand", r"10^3", "1e3"),
    "11/4": ("2 3/4", r"2\frac{3}{4}", "2.75"),
    "B": ("(B)", r"\text{B}", r"\textbf{(B)}\ 12", "B."),
    "(B)": ("B",),
    "50%": (r"50\%", "50 percent", "0.5", "50"),
    "50": (r"50\%",),
    "12:30": ("12:30", "12:30 PM"),
    "9:05": ("09:05",),
    "5": ("x = 5", "10-5 = 5", "5 cm", r"\text{Area} = 5"),
    "x = 5": ("5", "x=5"),
    "90": (r"90^\circ", "90 degrees", "90\N{DEGREE SIGN}"),
    "60 mph": ("60 miles per hour",),
    "5 m^2": ("5 square meters", r"5\text{ m}^2"),
    "1,2": ("2, 1", r"\{1, 2\}", "1 and 2", r"x = 1 \text{ or } x = 2", "x=1, x=2"),
    "2,-2": (r"\pm 2",),
    "(1,2)": (r"\left(1, 2\right)",),
    "[1,2)": (r"x \in [1, 2)",),
    r"(-\infty, 2) \cup (3, \infty)": (r"(3,\infty)\cup(-\infty,2)",),
    r"\emptyset": (r"\{\}", r"\varnothing"),
    r"\sqrt{2}": (r"\frac{2}{\sqrt{2}}", "\N{SQUARE ROOT}2"),
    "2": (r"\sqrt{4}",),
    "(x+1)^2": ("x^2+2x+1",),
    r"3\pi": ("3\N{GREEK SMALL LETTER PI}", "3pi"),
    "x > 5": ("5 < x",),
    r"\begin{pmatrix}1\\2\end{pmatrix}": (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",),
    "120": ("5!",),
    "Yes": ("yes", r"\text{Yes.}"),
    "Paris": ("paris", "Paris."),
    "12": ("十二", "twelve", "12个", "十二です", r"12\,\text{cm}^2"),
    "-5": ("负五", "negative five"),
    "3/4": ("three quarters", "四分之三"),
    "1/3": (r"0.\overline{3}",),
    "1/6": (r"0.1\overline{6}",),
    r"(-\infty, 3]": (r"x \le 3", "3 >= x"),
    "-1 < x <= 3": ("(-1, 3]",),
    "1010_2": ("1010",),
    "1:2": ("1 : 2",),
    "5:30 PM": ("17:30",),
    "11:00 AM": ("11 a.m.",),
    "5 hours": ("300 minutes",),
    "50 cents": ("$0.50",),
    "5 km": ("5000 m",),
    "30": (r"30\degree",),
    r"(3, \infty)": (r"(3, +\infty)",),
    "(x, y) = (1, 2)": ("(1, 2)",),
    "100": ("100\N{EURO SIGN}",),
    "36 km/h": ("36000 meters per hour",),
}  # fmt: skip

WRONG: dict[str, Sequence[str]] = {
    "12": ("1,2", "1 2", "-12", "12 million", "12x", "x + 12", "12 or 13"),
    "5": ("5/8", ".5", "-5", "\u22125", "2 or 5", "5-6", "5^2", r"5\pi", "5 6/7", r"\pm 5", "5 hundred", "x + y = 5"),
    "6": ("6 and a half", "6!", "2 6"),
    "3": ("3/x", "3/4", "3 1/2", "1, 2, 3"),
    "7": ("7/4", "7 to 8"),
    "1/3": ("0.333333", "0.33", "1:3"),
    "12:30": ("12:45", "12.30"),
    "12:30 PM": ("12:30 AM",),
    "18 m": ("18 cm", "18 m^2"),
    "x < 3": ("(-\\infty, 3]",),
    "5:30 AM": ("17:30",),
    "1010": ("1010_2",),
    "21": ("twenty one and six", "十二"),
    "8 km/h": ("8 m/s",),
    "$5": ("\N{EURO SIGN}5", "5\N{POUND SIGN}"),
    "5 km": ("5 m",),
    "18 dollars": ("18 cents",),
    "50 cents": ("$50",),
    "(1,2)": ("[1,2]", r"\{1,2\}", "(2,1)", "1, 2"),
    "[1,2)": ("(1,2]",),
    r"\{1,2\}": (r"\{1,2,3\}", "(1,2)"),
    "0.5": ("0.5%",),
    "1": ("1%", "0.9999999"),
    "A": ("B", "(C)", "A dog is one"),
    "a": ("A",),
    "AB": ("ab",),
    "10": ("10_2",),
    "x = 5": ("y = 5",),
    "x > 5": ("x < 5", r"x \ge 5"),
    "10^{-20}": ("10^{-21}",),
    "e^{-50}": ("e^{-60}",),
    "22/7": (r"\pi",),
    r"\sqrt{2}": ("1.414",),
    "yes": ("no", ""),
    "18": ("$18 and $20", "18, 20"),
}  # fmt: skip


@pytest.mark.parametrize(("gold", "said"), [(gold, said) for gold, group in RIGHT.items() for said in group])
def test_equal_answers_are_equal_however_they_are_written(gold: str, said: str) -> None:
    assert equal_answers(gold, said)


@pytest.mark.parametrize(("gold", "said"), [(gold, said) for gold, group in WRONG.items() for said in group])
def test_a_wrong_answer_is_never_right(gold: str, said: str) -> None:
    assert not equal_answers(gold, said)


@pytest.mark.parametrize(
    ("gold", "text", "finished", "outcome"),
    [
        ("8", "The answer is 5 + 3 = 8.", True, "right"),
        ("5", "five eighths\n#### 5/8", True, "wrong"),
        ("1", "So the total is \\boxed{1", True, "wrong"),
        ("1", "So the total is 1", False, "cut_off"),
        ("18", "So it is \\boxed{18}. Let me explain once mo", False, "right"),
        ("42", "<think>\n6 * 7 = 42. But wait", False, "cut_off"),
        ("42", "<think>\n6 * 7 = 42. But wait", True, "wrong"),
        ("7", "", True, "wrong"),
        ("12", "一共有十二个苹果", True, "right"),
        ("5", "答案是负5", True, "wrong"),
        ("5", "The answer is negative 5.", True, "wrong"),
        ("5", "结果是负5", True, "wrong"),
        ("5 km", "It is 5 m.", True, "wrong"),
        ("3 kg", "It weighs 3000 g.", True, "right"),
        ("$5", "He pays \N{EURO SIGN}5", True, "wrong"),
        ("72", "Check: 48/2 = 24, 48 + 24 = 72", True, "right"),
        ("72", r"\boxed{\text{The answer is } 72}", True, "right"),
        (r"\ln 2", "It is ln(2).", True, "right"),
        ("B", "故选B。", True, "right"),
        ("B", "Option B is correct.", True, "right"),
        ("B", "Answer: A or B", True, "wrong"),
        ("Yes", "Yes, it does.", True, "right"),
        ("Yes", "No, yes is wrong.", True, "wrong"),
        ("No", "No idea what you mean.", True, "wrong"),
        ("3", "[THINK]It is 3", False, "cut_off"),
        ("3", "<|channel|>analysis<|message|>5<|end|><|start|>assistant<|channel|>final<|message|>3", True, "right"),
    ],
)
def test_a_cut_off_is_an_outcome_of_its_own(gold: str, text: str, finished: bool, outcome: Outcome) -> None:
    assert judge(gold, text, finished=finished).outcome == outcome


def test_an_answer_inside_the_thinking_that_the_prompt_opened_is_none() -> None:
    prompt = "<|im_start|>assistant\n<think>\n"
    assert judge("42", "6 * 7 = 42", prompt=prompt, finished=False).outcome == "cut_off"
    assert judge("42", "6 * 7\n</think>\n\n42", prompt=prompt).outcome == "right"
