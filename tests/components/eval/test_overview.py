from dataclasses import replace

import pytest

from finemill.artifacts.evaluation import Sample
from finemill.artifacts.metrics import ModelName
from finemill.components.eval.metrics import summarize
from finemill.components.eval.overview import heat_map, short_name, verdict, worst_first


def sample(number: int, model: ModelName, right: bool | None, *, loss: float = 1.0, prompt: str = "ask") -> Sample:
    return Sample(
        id=f"{number}", source="own", model=model, prompt=prompt, completion="", reference="", exact_match=right,
        loss=loss, num_tokens=4, num_generated_tokens=5, finished=True, format_ok=True,
    )  # fmt: skip


def both(*pairs: tuple[bool | None, bool | None]) -> tuple[list[Sample], list[Sample]]:
    base = [sample(number, "base", before) for number, (before, _) in enumerate(pairs)]
    return base, [sample(number, "tuned", after) for number, (_, after) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(False, True)] * 30, "Tuning helps: 100.0 % of answers are right, 0.0 % before"),
        ([(True, False)] * 30, "Tuning does harm: 0.0 % of answers are right, 100.0 % before"),
        ([(True, False), (False, True)] * 5, "Tuning makes no difference that these rows can show"),
    ],
)
def test_the_verdict_claims_what_the_interval_allows(pairs: list[tuple[bool, bool]], said: str) -> None:
    base, tuned = both(*pairs)
    assert verdict(summarize(base, tuned)).startswith(said)


def test_without_answers_the_verdict_is_about_the_loss() -> None:
    base, tuned = both(*[(None, None)] * 5)
    tuned = [replace(one, loss=0.5) for one in tuned]
    said = verdict(summarize(base, tuned))
    assert said.startswith("Tuning helps: loss is 0.5, 1 before (\N{MINUS SIGN}0.5 ±")


def test_what_tuning_broke_comes_first() -> None:
    base, tuned = both((True, True), (False, True), (True, False), (False, False))
    assert [one.id for one, _ in worst_first(list(zip(base, tuned, strict=True)))] == ["2", "3", "1", "0"]


def test_errors_are_counted_by_source_and_length() -> None:
    rows = [sample(number, "tuned", number < 8, prompt="x" * (number + 1)) for number in range(16)]
    found = heat_map(rows)
    assert found is not None
    assert [(cell.wrong, cell.rows) for cell in found.rows[0][1]] == [(0, 4), (0, 4), (4, 4), (4, 4)]
    assert sum(cell.rows for _, cells in found.rows for cell in cells) == 16
    assert heat_map(rows[:5]) is None


def test_prompts_of_one_length_have_columns_all_the_same() -> None:
    found = heat_map([sample(number, "tuned", True) for number in range(20)])
    assert found is not None
    assert sum(cell.rows for cell in found.rows[0][1]) == 20


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://b/data/rows.jsonl", "rows.jsonl"),
        ("own", "own"),
        ("/", "/"),
        (f"hf://openai/gsm8k@{'0123456789' * 4}", "gsm8k@01234567"),
        (f"hf://openai/gsm8k@{'0123456789' * 4}/main", "gsm8k@01234567 main"),
    ],
)
def test_a_source_is_called_by_the_last_part_of_its_path(source: str, name: str) -> None:
    assert short_name(source) == name
