import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finemill.metrics.choices import read_label
from finemill.metrics.maths import judge
from finemill.metrics.quantities import read_compound
from finemill.rows.repeats import shorter_repeats

_WORDS = (
    "the is are not and or for in of per to than so because answer Paris A (B) 5 1,000 0.5 1/2 12:30 5kg 5-day $5 50% "
    r"= 1+1= - + / ( ) [ ] { } | $ $$ \( \] \frac{1}{2} \boxed{1} \boxed{ \sqrt{ \text{a} \left( \begin{align} "
    r"\end{align} ^{2} _{2} # #### ** ` , . ! ? : ; ' 十 是 は 是5 日 ½ é <b> <think> </think> <answer> CO2 (OH)2 "
    "March 2024-03-05 twenty hundred"
).split()
_TAILS = (
    "in for 5",
    "for 5 in for of",
    "of the 5kg",
    "5 days ago",
    "and 5 or",
    "the",
    "is the",
    "a-b",
    "5 per 5",
    "so",
)


@contextmanager
def _cpu_seconds(limit: float) -> Iterator[None]:
    """Fails where more of the processor's time is taken, however long a loaded machine has the test wait."""

    def stop(*_: object) -> None:
        raise AssertionError(f"more than {limit} s of the processor's time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("unit", [*_WORDS, *(f"{a} {b}, " for a, b in itertools.pairwise(_WORDS)), "x" * 1500 + "\n"])
def test_of_what_a_text_repeats_a_few_times_stay(unit: str) -> None:
    text = f"First {unit * (20_000 // len(unit))} and the end"
    short = shorter_repeats(text)
    assert len(short) < 6 * 1024
    assert (short[:6], short[-12:]) == (text[:6], text[-12:])
    # Of `$$` the sign is what is repeated.
    sign = unit if len(set(unit)) > 1 else unit[0]
    assert short.replace(sign, "") == text.replace(sign, "")


def test_a_text_without_repetitions_and_a_short_one_stay() -> None:
    counted = " ".join(map(str, range(5000)))
    assert (shorter_repeats(counted), shorter_repeats("- " * 500)) == (counted, "- " * 500)


@pytest.mark.parametrize("tail", _TAILS)
def test_what_follows_a_result_is_read_in_linear_time(tail: str) -> None:
    with _cpu_seconds(10):
        for end, gold in itertools.product((" ?", "!x", " is"), ("7", "Paris", "B", "yes")):
            judge(gold, f"So it is 2 + 5 = 7 {' '.join([tail] * 40)[:220]}{end}")


@pytest.mark.parametrize("word", ["largest", "a", "l'a"])
def test_a_sentence_of_one_long_word_is_read_in_linear_time(word: str) -> None:
    with _cpu_seconds(10):
        assert judge("Jupiter", f"Jupiter is the {(word * 180)[:180]}?").outcome == "wrong"


@pytest.mark.parametrize("word", _WORDS[::4])
def test_a_long_text_that_repeats_one_thing_is_judged(word: str) -> None:
    with _cpu_seconds(10):
        judge("7", f"{word} " * 20_000)
        read_label(f"{word}\n" * 20_000, ["yes", "no"])


@pytest.mark.parametrize("unit", ["5m\n", "5m and ", "5 mand "])
def test_a_sum_of_many_units_is_read_in_linear_time(unit: str) -> None:
    with _cpu_seconds(10):
        assert read_compound(f"{unit * 300}5") is None


@pytest.mark.parametrize("space", [" ", "\n"])
def test_empty_lines_are_read_in_linear_time(space: str) -> None:
    with _cpu_seconds(10):
        judge("7", space * 1500)
