"""The whole line as a user starts it: `finemill run finetune`, in a folder, and again."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Manifest
from finemill.runtime.catalog import STEPS
from tests.line.commands import LINE, finemill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class FinishedRun:
    """A run of the line and what it printed."""

    store: Path
    stdout: str
    stderr: str

    def manifest(self, step: str) -> Manifest:
        (path,) = self.store.glob(f"{step}/*/manifest.json")
        return Manifest.from_bytes(path.read_bytes(), str(path))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("line")
    result = finemill("run", "finetune", "--store", "store", cwd=folder, FINEMILL_CACHE=str(folder / "cache"))
    assert result.returncode == 0, result.stdout + result.stderr
    return FinishedRun(folder / "store", result.stdout, result.stderr)


def test_every_step_is_done_in_order(finished_run: FinishedRun) -> None:
    assert re.findall(r"^\[\d/8\] (\S+) +done", finished_run.stderr, re.MULTILINE) == LINE


def test_tuned_model_answers_what_the_base_fails(finished_run: FinishedRun) -> None:
    metrics = finished_run.manifest("eval").metrics
    assert 0 < metrics["eval/base/exact_match"] <= 0.3
    # Hard enough for a difference between two models to show, in both directions.
    assert 0.65 <= metrics["eval/tuned/exact_match"] <= 0.97
    assert metrics["eval/fixed_rate"] >= 0.6
    assert metrics["eval/tuned/loss"] < metrics["eval/base/loss"]


def test_gguf_files_answer_like_the_merged_model(finished_run: FinishedRun) -> None:
    metrics = finished_run.manifest("gguf-quantize").metrics
    for name in ("q8_0", "q4_k_m"):
        assert abs(metrics[f"gguf/{name}/exact_match"] - metrics["gguf/merged/exact_match"]) <= 0.05


def test_results_name_files_that_exist_and_the_registry_s_version(finished_run: FinishedRun) -> None:
    lines = dict(
        line.split(maxsplit=1) for line in finished_run.stdout.splitlines() if re.match(r"(adapter|report)\s", line)
    )
    assert (Path(lines["adapter"]) / "adapter_model.safetensors").is_file()
    assert Path(lines["report"]).read_text().lstrip().lower().startswith("<!doctype html>")
    assert [Path(path).suffix for path in re.findall(r"^GGUF +(\S+)$", finished_run.stdout, re.MULTILINE)] == [
        ".gguf"
    ] * 3
    assert re.search(r"^registry .*version 1.*@champion", finished_run.stdout, re.MULTILINE)
    assert re.search(r"^metric +base +tuned$", finished_run.stdout, re.MULTILINE)
    assert "mlflow ui --backend-store-uri" in finished_run.stdout


def test_artifacts_name_their_parents_and_config(finished_run: FinishedRun) -> None:
    for name in LINE:
        manifest = finished_run.manifest(name)
        assert set(manifest.parents) == set(STEPS[name].inputs)
        assert STEPS[name].config.model_validate(manifest.config)


def test_what_an_artifact_holds_does_not_depend_on_where_it_lies(finished_run: FinishedRun) -> None:
    """A repeat in another folder has the same bytes; places and times stand in the manifests alone."""
    computed = ("data-prep", "chat-format", "train-qlora", "eval", "merge", "gguf-quantize")
    files = [path for step in computed for path in finished_run.store.glob(f"{step}/*/**/*") if path.is_file()]
    place = str(finished_run.store).encode()
    assert not [path for path in files if path.name != "manifest.json" and place in path.read_bytes()]


def test_second_run_reuses_every_step(finished_run: FinishedRun) -> None:
    folder = finished_run.store.parent
    result = finemill("run", "finetune", "--store", "store", cwd=folder, FINEMILL_CACHE=str(folder / "cache"))
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\[\d/8\] (\S+) +reused", result.stderr, re.MULTILINE) == LINE


def test_mlflow_holds_the_run_with_a_nested_run_per_step(finished_run: FinishedRun) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished_run.store / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.finemill.step != ''", order_by=["attributes.start_time"])
    made = [run for run in runs if run.info.status == "FINISHED" and "finemill.reused" not in run.data.tags]
    by_step = {run.data.tags["finemill.step"]: run for run in made}
    assert set(LINE) <= set(by_step)
    assert len({by_step[name].data.tags["mlflow.parentRunId"] for name in LINE}) == 1
    parent = by_step["eval"].data.tags["mlflow.parentRunId"]
    assert {"report.html", "decision.md"} <= {item.path for item in client.list_artifacts(parent)}
    assert client.get_run(parent).data.tags["mlflow.note.content"].startswith("# finemill version 1: @champion")
    training = by_step["train-qlora"]
    losses = [point.value for point in client.get_metric_history(training.info.run_id, "train/loss")]
    assert len(losses) > 5
    assert losses[-1] < losses[0]
    assert training.data.params["learning_rate"]
