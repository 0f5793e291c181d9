from typing import Any

import pytest

from finemill.rows.values import is_missing, is_true, parse_json


@pytest.mark.parametrize("value", [None, float("nan"), "", " \n", [], {}])
def test_what_says_nothing_is_missing(value: Any) -> None:
    assert is_missing(value)
    assert not is_missing(0)
    assert not is_missing(False)


def test_yes_and_no_are_read_as_json_csv_and_python_write_them() -> None:
    yes: list[object] = [True, 1, "True", "1"]
    no: list[object] = [False, 0, 0.0, "false", " no "]
    neither: list[object] = ["sports", 0.5, 2, None, []]
    assert [is_true(value) for value in yes + no + neither] == [True] * 4 + [False] * 5 + [None] * 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('[{"a": null}]', [{"a": None}]),
        ("[{'a': None, 'b': True}]", [{"a": None, "b": True}]),
        (r"{'a': '\d'}", {"a": r"\d"}),
        ("[INST] a [/INST]", "[INST] a [/INST]"),
        ("{'a': open('x')}", "{'a': open('x')}"),
        ("{% if a %}", "{% if a %}"),
        (5, 5),
    ],
)
def test_lists_and_objects_are_read_from_texts_that_hold_them(text: Any, value: Any) -> None:
    assert parse_json(text) == value
