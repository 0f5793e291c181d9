import json
from pathlib import Path

import pytest

from finemill.artifacts.records import Record, read_record, write_json, write_record
from finemill.errors import UserError


class Place(Record):
    name: str
    visitors: int | None = None


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", Place(name="Zürich"))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "Zürich",\n  "visitors": null\n}\n'
    assert read_record(tmp_path / "a.json", Place, "merge") == Place(name="Zürich")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"visitors": "many"}', r"'name': Field required; 'visitors': .* \(found 'many'\)\): run merge again"),
        ('{"name"', "Invalid JSON"),
        ("[1]", "should be an object"),
    ],
)
def test_what_is_no_such_record_is_said_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_record(tmp_path / "a.json", Place, "merge")
    assert "\n" not in str(error.value)


def test_a_missing_file_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json not found: merge writes it; pass the reference it printed"):
        read_record(tmp_path / "a.json", Place, "merge")


def test_keys_of_a_later_version_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "Ulm", "mayor": "x"}')
    assert read_record(tmp_path / "a.json", Place, "merge").name == "Ulm"


def test_what_is_no_number_in_json_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, (float("inf"),)], "c": {"d": -float("inf")}, "e": 2})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, [None]], "c": {"d": None}, "e": 2}
