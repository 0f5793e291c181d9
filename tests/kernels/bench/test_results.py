"""Figures that are shown anywhere are those of results.jsonl."""

import re
from pathlib import Path

import pytest

from finemill.kernels.bench.results import MORE, PAGE, WITHIN, page, with_figures
from finemill.kernels.bench.runs import Quantiles, StepRun, read_runs

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
WRITE = "python -m finemill.kernels.bench.results --write"


@pytest.mark.parametrize("path", [PAGE, MORE], ids=lambda path: path.name)
def test_a_page_is_what_the_runs_say(path: Path) -> None:
    assert page(read_runs(), path) == path.read_text(), f"run {WRITE}"


def test_the_readmes_figures_are_what_the_runs_say() -> None:
    assert with_figures(README, read_runs()) == README, f"run {WRITE}"


def test_a_later_run_of_a_setting_replaces_the_earlier_one() -> None:
    runs = read_runs()
    run = next(run for run in reversed(runs) if isinstance(run, StepRun) and run.tokens_per_s == 17488)
    times = Quantiles(p20=0.8, p50=0.81917, p80=0.82)
    faster = run.model_copy(update={"tokens_per_s": 20_001.0, "step_s": times})
    assert "| 20,001 (19,980 to 20,480) |" in page([*runs, faster])
    assert "| 20,001 (" not in page([faster, *runs])


def test_the_changelog_promises_what_the_planner_is_held_to() -> None:
    (promised,) = re.findall(r"`finemill estimate` predicts within (\d+) %", (ROOT / "CHANGELOG.md").read_text())
    assert int(promised) == max(within.peak for within in WITHIN.values())


def test_the_readme_names_the_sizes_of_the_images() -> None:
    table = (ROOT / "images" / "README.md").read_text()
    small, large = (
        re.search(rf"^\| `finemill-{role}` .*?\| ([\d.]+ GB)", table, re.MULTILINE) for role in ("cpu", "train")
    )
    assert small is not None
    assert large is not None
    assert f"{small[1]} without torch, {large[1]} with." in README


def test_a_line_that_is_not_of_the_format_is_named(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"kind": "step"}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1: .*"):
        read_runs(file)
