import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from finemill.models.base.corpus import arithmetic_fact, document
from finemill.models.base.exercises import EXERCISES
from finemill.rows.examples.reasoning import FAMILIES

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def test_arithmetic_facts_are_true_and_stay_between_0_and_240() -> None:
    rng = Random(0)
    for _ in range(5000):
        a, operator, b, result = arithmetic_fact(rng)
        assert OPERATIONS[operator](a, b) == result
        assert operator != "/" or a % b == 0
        assert 0 <= min(a, b, result) <= max(a, b, result) <= 240


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.__name__)
def test_exercises_work_out(exercise: Callable[[Random], Any]) -> None:
    for seed in range(300):
        _, steps, result = exercise(Random(seed))
        for step in steps:
            equation = EQUATION.fullmatch(step)
            assert equation, step
            a, operator, b, value = equation.groups()
            assert OPERATIONS[operator](int(a), int(b)) == int(value), step
            assert 0 <= int(value) <= 200
        assert steps[-1].endswith(f" = {result}")


def test_no_example_problem_is_in_the_pretraining_text() -> None:
    def wording(text: str) -> set[str]:
        """Sentences with numbers and names blanked, as long as they say something of their own."""
        blanked = re.sub(r"\b[A-Z][a-z]+\b", "N", re.sub(r"\d+", "0", text))
        return {sentence for sentence in re.split(r"(?<=[.?]) |\n", blanked) if len(sentence.split()) > 8}

    rng = Random(1)
    pretraining = set().union(*(wording(document(rng)) for _ in range(5000)))
    problems = set().union(*(wording(family(rng).question) for family in FAMILIES for _ in range(200)))
    assert pretraining
    assert problems
    assert not problems & pretraining


def test_documents_follow_from_the_seed() -> None:
    first, second, other = Random(3), Random(3), Random(4)
    assert [document(first) for _ in range(50)] == [document(second) for _ in range(50)]
    assert document(other) != document(Random(3))
