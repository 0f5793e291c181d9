"""Answers as models write them and the verdict on each: kinds that the trackers of evaluation tools report.

`verdicts/*.jsonl` holds what `finemill score` reads, a line per answer, with the verdict that is right.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from finemill.metrics.choices import read_label
from finemill.metrics.maths import judge
from finemill.metrics.scoring import read_predictions, score_predictions

TABLES = Path(__file__).with_name("verdicts")
SCORES = {"maths": "exact_match", "tools": "tool_calls", "json": "json_ok", "regex": "regex_ok"}


@pytest.mark.parametrize("metric", SCORES)
def test_every_answer_of_the_table_is_judged_as_it_says(metric: str) -> None:
    lines = (TABLES / f"{metric}.jsonl").read_text(encoding="utf-8").splitlines()
    scores = score_predictions(read_predictions(lines, metric), [metric])
    table: list[dict[str, Any]] = [json.loads(line) for line in lines]
    misjudged = [
        row for row, score in zip(table, scores, strict=True) if (score[SCORES[metric]] == 1) != bool(row["right"])
    ]
    assert not misjudged


def test_every_label_of_the_table_is_read_as_it_says() -> None:
    table = [json.loads(line) for line in (TABLES / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not [row for row in table if read_label(row["prediction"], row["labels"]) != row["label"]]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("5 ", True),
        ("The answer is 5. ", True),
        ("The answer is 6. ", False),
        (r"\boxed{5} ", True),
        (r"\boxed{", False),
        ("( ", False),
        ("(((((((((((((((", False),
        (" " * 100, False),
        (r"\frac{1}{", False),
        (r"\text{", False),
        (r"\begin{align}", False),
        ("Ca(OH)", False),
        ("The answer is not ", False),
        ("5", False),
    ],
)
def test_an_answer_said_a_thousand_times_is_judged_at_once(text: str, right: bool) -> None:
    assert (judge("5", text * 1000).outcome == "right") == right


def test_boxes_in_boxes_are_opened_as_far_as_anyone_nests_them() -> None:
    assert judge("5", r"\boxed{" * 3 + "5" + "}" * 3).outcome == "right"
    assert judge("5", r"\boxed{" * 300 + "5" + "}" * 300).outcome == "wrong"
