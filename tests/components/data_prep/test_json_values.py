import io
import json
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest

from finemill.components.data_prep import json_values
from finemill.components.data_prep.json_values import JsonValues
from finemill.errors import UserError


def items(text: str) -> list[Any]:
    return list(JsonValues(io.StringIO(text), "a.json").items())


def test_values_are_the_same_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(0)
    values = [
        rng.choice([{"a": "x\\" * n, "b": [n, -1.5e3, None, True]}, "\u00e9" * n, n**9, [], {}]) for n in range(60)
    ]
    for indent in (None, 1):
        text = json.dumps(values, indent=indent)
        for size in (1, 2, 7, 64, 1 << 20):
            monkeypatch.setattr(json_values, "_PIECE", size)
            assert items(text) == values


def test_a_number_at_the_end_of_a_piece_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_PIECE", 3)
    assert items("[12345, 6]") == [12345, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', "a.json, line 3: not valid JSON .Expecting ':' delimiter at column 6"),
        ("[1 2]", "line 1: not valid JSON .Expecting ',' delimiter at column 4"),
        ("[1,\n2", "line 2: not valid JSON"),
        ('["abc', "line 1: not valid JSON .Unterminated string"),
        (f"[{'[' * 5000}", "line 1: not valid JSON .nested too deeply"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        items(text)


def test_memory_holds_one_value_however_long_the_list_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = {"text": "word " * 200}
    path.write_text(json.dumps([row] * 20_000))
    with path.open() as file:
        tracemalloc.start()
        count = sum(value == row for value in JsonValues(file, "a.json").items())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 20_000
    assert path.stat().st_size > 20_000_000
    assert peak < 12_000_000
