"""`finemill score`: predictions that exist already."""

import json
from pathlib import Path
from typing import Any

import pytest

from finemill.cli import main

ROWS = [
    {"prediction": "It is \\boxed{\\frac{1}{2}}.", "reference": "0.5", "source": "maths"},
    {"prediction": "So 3/4", "reference": "3", "source": "maths"},
    {"prediction": "6 * 7 is 4", "reference": "42", "source": "other", "finished": False},
    {"prediction": "Hence\n#### 18 dollars", "reference": "9 * 2 = 18\n#### 18", "source": "other"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_table_has_a_line_per_metric_and_source(file: Path, capsys: Any) -> None:
    assert main(["score", str(file), "--metrics", "maths,chrf"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["source", "metric", "rows", "mean", "95", "%"]
    assert [line[:4] for line in lines[1:] if line[1] != "chrf"] == [
        ["all", "exact_match", "4", "0.5000"],
        ["all", "cut_off", "4", "0.2500"],
        ["maths", "exact_match", "2", "0.5000"],
        ["maths", "cut_off", "2", "0.0000"],
        ["other", "exact_match", "2", "0.5000"],
        ["other", "cut_off", "2", "0.5000"],
    ]


def test_json_has_an_object_per_row_and_the_means(file: Path, capsys: Any) -> None:
    assert main(["score", str(file), "--metrics", "maths,rouge", "--json"]) == 0
    *rows, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["outcome"] for row in rows] == ["right", "wrong", "cut_off", "right"]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["final_answer"] == "18 dollars"
    assert summary["means"]["exact_match"]["mean"] == 0.5
    assert summary["means"]["rougeL"]["stderr"] > 0
    assert set(summary["by_source"]) == {"maths", "other"}


def test_labels_have_an_f1(tmp_path: Path, capsys: Any) -> None:
    rows = [("A", "A"), ("(A)", "A"), ("B", "A"), ("B", "B")]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(json.dumps({"prediction": said, "reference": gold}) for said, gold in rows))
    assert main(["score", str(path), "--metrics", "choice", "--json"]) == 0
    means = json.loads(capsys.readouterr().out.splitlines()[-1])["means"]
    assert means["accuracy"]["mean"] == 0.75
    assert means["macro_f1"]["mean"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_a_label_is_one_however_it_is_spelled_and_a_source_may_have_no_name(tmp_path: Path, capsys: Any) -> None:
    rows = [("yes", "Yes", ""), ("No", "no", "web"), ("NO", "yes", "web"), ("Yes.", "yes", "web")]
    path = tmp_path / "labels.jsonl"
    lines = [json.dumps({"prediction": said, "reference": gold, "source": source}) for said, gold, source in rows]
    path.write_text("\ufeff" + "\n".join(lines))
    assert main(["score", str(path), "--metrics", "choice", "--json"]) == 0
    *scores, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [score["accuracy"] for score in scores] == [True, True, False, True]
    assert summary["means"]["accuracy"]["rows"] == 4
    assert summary["by_source"][""]["macro_f1"]["mean"] == 1.0
    assert summary["by_source"]["web"]["macro_f1"]["mean"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_rules_come_from_the_row_or_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    path, schema = tmp_path / "rows.jsonl", tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    own = {"prediction": "[1]", "schema": {"type": "array"}, "pattern": r"\[\d\]"}
    path.write_text("\n".join(json.dumps(row) for row in (own, {"prediction": "[1]"}, {"prediction": "{}"})))
    arguments = ["score", str(path), "--metrics", "json,regex", "--schema", str(schema), "--pattern", r"\{\}", "--json"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]
    assert [(row["json_ok"], row["regex_ok"]) for row in rows] == [(True, True), (False, False), (True, True)]


def test_tool_calls_are_compared_with_a_list(tmp_path: Path, capsys: Any) -> None:
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"prediction": f"<tool_call>{json.dumps(call)}</tool_call>", "reference": [call]}))
    assert main(["score", str(path), "--metrics", "tools", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row == {"line": 1, "tool_names": 1.0, "tool_arguments": 1.0, "tool_order": 1.0, "tool_calls": True}


@pytest.mark.parametrize(
    ("content", "metrics", "line"),
    [
        ("", "maths", "holds no rows"),
        ("{", "maths", "line 1 is not JSON"),
        ("[1]", "maths", "line 1 holds a list"),
        ('{"reference": "1"}', "maths", "line 1: `prediction` is missing"),
        ('{"prediction": null}', "maths", "line 1: `prediction` is null"),
        ('{"prediction": "1"}', "maths", "line 1 has no `reference`"),
        ('{"prediction": "1", "reference": 1, "finished": "no"}', "maths", '`finished` is "no"'),
        ('{"prediction": "1", "reference": NaN}', "maths", "line 1 is not JSON: NaN"),
        ('{"prediction": "1", "reference": ["1", "2"]}', "choice", "line 1 has several references"),
        ('{"prediction": "1"}', "regex", "line 1 has no `pattern`"),
        ('{"prediction": "1"}', "meteor", "unknown metric 'meteor'; the metrics are maths, rouge, bleu"),
        ('{"prediction": "1", "schema": "{"}', "json", "no JSON schema"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(
    tmp_path: Path, content: str, metrics: str, line: str, capsys: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert main(["score", str(path), "--metrics", metrics]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_missing_file_is_named(capsys: Any) -> None:
    assert main(["score", "nowhere.jsonl", "--metrics", "maths"]) == 2
    assert capsys.readouterr().err == "finemill score: nowhere.jsonl: No such file or directory\n"


def test_a_separator_of_lines_inside_a_text_parts_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prediction": "a\u2028b", "reference": "a"}\n', encoding="utf-8")
    assert main(["score", str(path), "--metrics", "rouge"]) == 0


def test_of_several_references_the_best_one_counts(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prediction": "Big Apple \\ud800", "reference": ["New York", "Big Apple"]}\n')
    assert main(["score", str(path), "--metrics", "rouge,maths", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["rouge1"] == 1.0


def test_the_unit_that_a_question_asks_for_is_that_of_the_answer(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prediction": "Each costs $0.25.", "reference": "25", "prompt": "What does it cost in cents?"}\n')
    assert main(["score", str(path), "--metrics", "maths", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["exact_match"] is True
