import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from finemill.errors import UserError
from finemill.rows.answers import final_answer
from finemill.rows.examples.generate import EXAMPLES, write_example_data
from finemill.rows.examples.problem import Problem
from finemill.rows.examples.reasoning import FAMILIES


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path: Path) -> None:
    first = write_example_data("reasoning", tmp_path / "a", seed=1, num_rows=50).read_bytes()
    assert write_example_data("reasoning", tmp_path / "b", seed=1, num_rows=50).read_bytes() == first
    assert write_example_data("reasoning", tmp_path / "c", seed=2, num_rows=50).read_bytes() != first


@pytest.mark.parametrize("name", ["reasoning", "chat", "preferences"])
def test_rows_differ_from_each_other(name: str, tmp_path: Path) -> None:
    lines = write_example_data(name, tmp_path, seed=0, num_rows=800).read_text().splitlines()
    assert len(set(lines)) == 800


def test_reasoning_rows_have_openmathreasoning_columns_and_their_own_answer(tmp_path: Path) -> None:
    for line in write_example_data("reasoning", tmp_path, seed=0, num_rows=500).read_text().splitlines():
        row = json.loads(line)
        assert list(row) == ["problem", "generated_solution", "expected_answer"]
        assert final_answer(row["generated_solution"]) == row["expected_answer"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_equation_holds_and_stays_between_0_and_200(family: Callable[[Random], Problem]) -> None:
    for seed in range(300):
        problem = family(Random(seed))
        for equation in problem.equations:
            left, _, right = equation.partition(" = ")
            assert eval(left) == int(right), equation
            assert 0 <= int(right) <= 200
        assert problem.equations[-1].endswith(f"= {problem.answer}")


def test_chats_alternate_and_end_with_the_assistant(tmp_path: Path) -> None:
    for line in write_example_data("chat", tmp_path, seed=0, num_rows=300).read_text().splitlines():
        turns = [turn["from"] for turn in json.loads(line)["conversations"] if turn["from"] != "system"]
        assert turns == ["human", "gpt"] * (len(turns) // 2)


def test_every_topic_of_the_preferences_has_many_prompts_and_both_kinds_of_worse_answer(tmp_path: Path) -> None:
    """A topic with few prompts would all but vanish when data-prep drops what repeats."""
    lines = write_example_data("preferences", tmp_path, seed=0, num_rows=1400).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for key in ("capital", "color", "opposite", "live", "day comes", "How many", "What is"):
        of_topic = [row for row in rows if key in row["prompt"]]
        assert len({row["prompt"] for row in of_topic}) > 80, key
        lengths = [len(row["rejected"].split()) < len(row["chosen"].split()) for row in of_topic]
        assert 0.3 < sum(lengths) / len(lengths) < 0.7, key
    assert all(row["chosen"] != row["rejected"] and row["chosen"].endswith(".") for row in rows)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="example data are example:reasoning, example:chat, example:preferences"):
        write_example_data("poems", tmp_path, seed=0, num_rows=1)


def test_asking_for_more_rows_than_there_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXAMPLES, "coin", lambda rng: {"side": rng.choice("ht")})
    with pytest.raises(UserError, match="only about 2 different rows: ask for fewer than 3"):
        write_example_data("coin", tmp_path, seed=0, num_rows=3)
