import json
import logging
from pathlib import Path
from typing import Any

import pytest

from finemill.components.data_prep.read import Damaged, read_rows
from finemill.errors import UserError

ROW = {"question": "2+2?", "answer": "4"}
OTHER = {"question": "2+3?", "answer": "5"}


def written(folder: Path, value: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(value))
    return path


def test_a_file_with_a_list_for_each_split_has_the_rows_of_the_one_that_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, {"train": [ROW], "test": [OTHER]})
    assert list(read_rows(path, split="train")) == [ROW]
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        assert list(read_rows(path)) == [ROW, OTHER]
    assert "train and test are read as one" in caplog.text
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test"):
        list(read_rows(path, split="dev"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW)),
        ("rows.json", json.dumps([ROW])),
        ("rows.json", json.dumps(ROW)),
        ("rows.csv", "question,answer\n2+2?,4\n"),
    ],
)
def test_a_file_without_splits_is_train_or_what_its_name_says(tmp_path: Path, name: str, text: str) -> None:
    for path in (tmp_path / name, tmp_path / f"dev-{name}"):
        path.write_text(text)
    assert list(read_rows(tmp_path / name, split="train"))[:1] == [ROW]
    assert list(read_rows(tmp_path / f"dev-{name}", split="dev"))[:1] == [ROW]
    with pytest.raises(UserError, match=r"no split 'dev' in it, and its name does not say so; leave split out$"):
        list(read_rows(tmp_path / name, split="dev"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"version": "1", "train_sft": [ROW], "test_sft": [OTHER]}),
        json.dumps({"train_sft": [ROW], "test_sft": [OTHER], "languages": ["en"]}) + "\n",
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_splits_may_have_longer_names_and_descriptions_beside_them(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert list(read_rows(tmp_path / name, split="train_sft")) == [ROW]


def test_answers_of_the_hubs_api_are_its_rows_and_one_that_was_cut_is_damaged(tmp_path: Path) -> None:
    answer = {
        "features": [{"feature_idx": 0, "name": "question"}],
        "rows": [
            {"row_idx": 0, "row": ROW, "truncated_cells": []},
            {"row_idx": 1, "row": OTHER, "truncated_cells": ["answer"]},
        ],
        "num_rows_total": 2,
    }
    whole, cut = read_rows(written(tmp_path, answer))
    assert whole == ROW
    assert isinstance(cut, Damaged)
    assert "answer" in cut.problem


def test_the_questions_of_squads_files_have_their_paragraphs(tmp_path: Path) -> None:
    question = {"id": "q", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    value = {
        "version": "1.1",
        "data": [{"title": "A", "paragraphs": [{"context": "Ann eats.", "qas": [question]}]}],
    }
    assert list(read_rows(written(tmp_path, value))) == [{"context": "Ann eats.", **question}]


def task(results: list[Any], **annotation: Any) -> dict[str, Any]:
    return {"id": 1, "data": {"prompt": "2+2?"}, "annotations": [{"result": results, **annotation}], "predictions": []}


def test_a_task_of_label_studio_has_what_its_annotator_said(tmp_path: Path) -> None:
    said = {"from_name": "response", "type": "textarea", "value": {"text": ["4"]}}
    good = {"from_name": "quality", "type": "choices", "value": {"choices": ["Good"]}}
    side = {"from_name": "winner", "type": "pairwise", "value": {"selected": "right"}}
    rows = list(read_rows(written(tmp_path, [task([said, good]), task([side])])))
    assert rows == [{"prompt": "2+2?", "response": "4", "quality": "Good"}, {"prompt": "2+2?", "winner": "second"}]


@pytest.mark.parametrize(
    "wrong",
    [
        task([], was_cancelled=True),
        task([{"from_name": "prompt", "value": {"text": ["x"]}}]),
        {**task([]), "annotations": [{"result": [1]}, {"result": [2]}]},
    ],
)
def test_a_task_that_says_no_one_thing_is_damaged(tmp_path: Path, wrong: Any) -> None:
    (row,) = read_rows(written(tmp_path, [wrong]))
    assert isinstance(row, Damaged)


def test_a_chatgpt_export_has_the_branch_that_was_shown_last(tmp_path: Path) -> None:
    def node(parent: str | None, role: str, text: str, **fields: Any) -> dict[str, Any]:
        content = {"content_type": "text", "parts": [text]}
        return {"parent": parent, "message": {"author": {"role": role}, "content": content, **fields}}

    chat = {
        "title": "Sums",
        "mapping": {
            "root": {"parent": None, "message": None},
            "a": node("root", "user", "2+2?"),
            "b": node("a", "assistant", "5"),
            "c": node("a", "assistant", "4", weight=1.0),
            "d": node("c", "assistant", "hidden", weight=0.0),
        },
        "current_node": "c",
    }
    (row,) = read_rows(written(tmp_path, [chat]))
    assert row == {
        "messages": [{"role": "user", "content": ["2+2?"]}, {"role": "assistant", "content": ["4"]}],
        "title": "Sums",
    }
