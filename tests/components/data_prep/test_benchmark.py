import json
from pathlib import Path
from typing import Any

import pytest

from finemill.errors import UserError
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
SHORT = "A train leaves Ulm at nine and arrives at noon"


def prepare(tmp_path: Path, rows: list[dict[str, Any]], **config: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of rejected.jsonl, and data.json."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"sources": [{"uri": str(source)}], "test_size": 0, "validation_size": 0, **config}
    folder = fetch_artifact(run_step("data-prep", store=tmp_path.as_uri(), inputs={}, config=fields).reference)[0]
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return rejected, json.loads((folder / "data.json").read_text())


def test_rows_that_share_a_run_of_words_with_a_benchmark_are_left_out(tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": QUESTION, "answer": "72"}) + "\n" + json.dumps({"text": SHORT}) + "\n")
    rows = [
        {"prompt": "Solve: " + QUESTION.upper().replace("  ", " "), "completion": "72"},
        {"prompt": "What is this?", "completion": f"You asked: {SHORT.lower()}, did you not?"},
        {"prompt": "Natalia sold clips to 48 of her friends.", "completion": "Yes."},
        {"prompt": "Hi", "completion": "72"},
    ]
    rejected, _ = prepare(tmp_path, rows, benchmarks=[str(exam)])
    assert [(line["row"], line["reason"], line["field"]) for line in rejected] == [
        (1, "benchmark", f"row 1 of {exam}"),
        (2, "benchmark", f"row 2 of {exam}"),
    ]


def test_a_benchmark_without_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="has no row with a text"):
        prepare(tmp_path, [{"text": "a"}], benchmarks=[str(tmp_path / "exam.jsonl")])


def test_doubtful_rows_are_counted_and_left_out_if_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "I cannot assist with that."}, {"prompt": "a", "completion": "b"}]
    rejected, data = prepare(tmp_path, rows)
    assert (rejected, data["sources"][0]["flags"]) == ([], {"refusal": {"rows": 1, "first": [1]}})
    assert data["advice"].startswith("2 training rows: ")
    rejected, _ = prepare(tmp_path, rows, drop_flagged=["refusal"])
    assert [(line["row"], line["reason"]) for line in rejected] == [(1, "refusal")]


def test_a_near_duplicate_names_the_row_it_repeats(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    rejected, _ = prepare(tmp_path, [{"text": words}, {"text": f"{words} end"}], dedup="minhash")
    assert [(line["row"], line["reason"], line["field"]) for line in rejected] == [(2, "near_duplicate", "row 1")]
