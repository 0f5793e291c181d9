"""A run becomes a line that can be read again, and says how to repeat it."""

import argparse
from pathlib import Path

import pytest

from finemill.kernels.bench.runs import PlanRecord, Quantiles, add_record_argument, header
from finemill.kernels.engine.plan import Level, Plan


def test_the_middle_three_fifths_of_the_times() -> None:
    assert Quantiles.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Quantiles(p20=2.0, p50=3.5, p80=5.0)
    assert Quantiles.of([2.0]) == Quantiles(p20=2.0, p50=2.0, p80=2.0)


def test_a_plan_is_made_again_from_its_record() -> None:
    plan = Plan(
        levels=(Level.INPUT, Level.INPUT, Level.ALL),
        host_levels=(Level.INPUT, None, None),
        cached_layers=0,
        head_chunk=512,
        bytes_per_token={Level.INPUT: 8},
        micro_batch=2048,
        embedding_on_host=True,
        stream_weights=True,
        in_flight=2,
        key_heads=4,
    )
    record = PlanRecord.of(plan)
    assert record.levels == [("INPUT", 2), ("ALL", 1)]
    assert PlanRecord.model_validate_json(record.model_dump_json()).plan({Level.INPUT: 8}) == plan


def test_the_command_is_kept_without_the_folders_of_this_machine() -> None:
    words = ["--rows", "/data/a.json,b/c.json", "--json", "r.json", "--record=x.jsonl", "--bs", "8"]
    assert header("loss", words)["command"] == "finemill bench loss --rows a.json,c.json --bs 8"


def test_a_file_in_no_folder_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_record_argument(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--record", str(tmp_path / "missing" / "runs.jsonl")])
    assert "is not a folder" in capsys.readouterr().err
