"""The benchmark of mixtures trains one model on the engine and by transformers, and holds their losses together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finemill.kernels.bench import moe
from finemill.kernels.bench.moe_losses import compare
from finemill.kernels.bench.runs import MixtureLosses, read_runs


@pytest.mark.filterwarnings("ignore")
def test_the_engine_and_transformers_train_one_mixture_alike(
    tiny_mixture_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recorded = tmp_path / "moe-L2", tmp_path / "runs.jsonl"
    shutil.copytree(tiny_mixture_dir, folder)
    (folder / "DONE").touch()
    words = "losses --layers 2 --rows 2 --seq 16 --rank 4 --steps 5 --warmup 0 --sets 2 --lr 5e-3 --device cpu"
    assert moe.main([*words.split(), "--folder", str(tmp_path), "--record", str(recorded)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("BENCH "))
    losses = record["losses"]
    assert record["same"]
    assert losses.keys() == {"sdpa", "eager", "finemill", "float32"}
    assert losses["finemill"] == pytest.approx(losses["float32"], abs=1e-3)
    assert losses["finemill"][4] < losses["finemill"][0] - 0.01
    (run,) = read_runs(recorded)
    assert isinstance(run, MixtureLosses)
    assert run.losses == losses


@pytest.mark.parametrize(("ours", "same"), [(2.02, True), (2.2, False), (float("nan"), False)])
def test_losses_are_the_same_within_the_spread_of_transformers_own(ours: float, same: bool) -> None:
    losses: dict[str, list[Any]] = {"sdpa": [3.0, 2.0], "eager": [3.0, 2.04], "float32": [3.0, 2.01]}
    outcome = compare(losses | {"finemill": [3.0, ours]})
    assert outcome["same"] == same
    assert outcome["spread"] == pytest.approx(0.02)
