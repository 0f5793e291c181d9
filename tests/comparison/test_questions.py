import json
from pathlib import Path

import pytest

from finemill.comparison.questions import read_questions
from finemill.errors import UserError


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_users_file_of_any_shape_gives_questions_and_what_is_left_out(tmp_path: Path) -> None:
    where = write(
        tmp_path / "own.jsonl",
        {"problem": "7 * 8?", "generated_solution": "<think>\n56\n</think>\n\nIt is 56.", "expected_answer": "56"},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
        {"question": "Nothing else"},
    )
    found = read_questions(where)
    assert [(row.messages[-1]["content"], row.reference, row.answer) for row in found.rows] == [
        ("7 * 8?", "It is 56.", "56"),
        ("Hi.", "Hello.", None),
    ]
    assert found.left_out.total() == 1
    assert len({row.id for row in found.rows}) == 2


def test_a_dataset_gives_its_held_out_rows(tiny_dataset_dir: Path) -> None:
    rows = read_questions(str(tiny_dataset_dir)).rows
    assert len(rows) == 8
    assert {row.source for row in rows} == {"example:chat", "example:reasoning"}
    assert all("<think>" not in row.reference for row in rows)
    assert [row.answer is None for row in rows] == [row.source == "example:chat" for row in rows]


@pytest.mark.parametrize("where", ["nowhere.jsonl", "README"])
def test_what_is_no_file_of_rows_is_refused(where: str) -> None:
    with pytest.raises(UserError, match="no such file or folder; give the reference"):
        read_questions(where)


def test_rows_without_a_reference_are_refused_in_one_line(tmp_path: Path) -> None:
    where = write(tmp_path / "own.jsonl", {"question": "Why?"}, {"question": "How?"})
    with pytest.raises(
        UserError, match=r"no row has a question and a reference answer \(2 without a reference\)"
    ) as raised:
        read_questions(where)
    assert "\n" not in str(raised.value)
