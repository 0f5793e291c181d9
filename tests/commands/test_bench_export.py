import json
from pathlib import Path

import pytest

from finemill.commands.bench import execute


def test_a_merge_is_measured_part_by_part_beside_pefts_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute("bench", ["export", "--shape", "qwen3-tiny", "--folder", str(tmp_path), "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["program"] for result in results] == ["finemill", "PEFT"]
    for result in results:
        assert result["shape"] == "qwen3-tiny"
        assert 0 < result["size_gb"] < 0.1
        assert sum(result["parts_s"].values()) == pytest.approx(result["wall_s"])
        assert result["peak_gib"] > 0
    assert not list(tmp_path.iterdir())
