import json
from pathlib import Path

import pytest

from finemill.commands.bench import execute
from finemill.commands.bench_data import prepare_plainly, write_chats


def test_the_example_rows_are_chats_of_which_none_repeats_another(tmp_path: Path) -> None:
    lines = write_chats(tmp_path / "rows.jsonl", 80).read_text().splitlines()
    assert len({json.loads(line)["messages"][0]["content"] for line in lines}) == len(lines) == 80


@pytest.mark.slow
def test_both_ways_are_measured_on_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    assert execute("bench", ["data", "--rows", "40", "--json"]) == 0
    ours, plain = json.loads(capsys.readouterr().out).values()
    assert ours["rows"] == plain["rows"] == 40
    assert all(cost["cpu_s"] > 0 and cost["wall_s"] > 0 and cost["peak_mb"] > 0 for cost in (ours, plain))


@pytest.mark.slow
def test_the_usual_way_learns_the_answers(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import pyarrow.parquet as pq

    rows = write_chats(tmp_path / "rows.jsonl", 8)
    prepare_plainly(str(rows), str(tmp_path), "builtin:tiny-qwen3", "1")
    table = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert len(table) == 8
    assert all(0 < sum(label != -100 for label in row["labels"]) < len(row["labels"]) for row in table)
