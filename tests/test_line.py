"""The whole line as a user starts it: in a folder, again, in a bucket, and interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Manifest
from finemill.pipelines.finetune import FINETUNE
from finemill.pipelines.local import for_this_machine
from finemill.runtime.catalog import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LINE = [task.name for task in for_this_machine(FINETUNE).tasks]


@dataclass(frozen=True)
class FinishedRun:
    """A run of the line and what it printed."""

    store: Path
    stdout: str
    stderr: str

    def manifest(self, step: str) -> Manifest:
        (path,) = self.store.glob(f"{step}/*/manifest.json")
        return Manifest.from_bytes(path.read_bytes(), str(path))


def finemill(*arguments: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_TRACKING"))}
    return subprocess.run(
        [sys.executable, "-m", "finemill", *arguments],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


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
    assert metrics["eval/base/exact_match"] <= 0.2
    assert metrics["eval/fixed_rate"] >= 0.9
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
    training = by_step["train-qlora"]
    losses = [point.value for point in client.get_metric_history(training.info.run_id, "train/loss")]
    assert len(losses) > 5
    assert losses[-1] < losses[0]
    assert training.data.params["learning_rate"]


def quick(store: str) -> list[str]:
    """The line with a few training steps: everything but the score is as in the default."""
    return [
        "run",
        "finetune",
        "--store",
        store,
        "--train-qlora.max-steps",
        "4",
        "--data-prep.sources",
        '[{uri: "example:reasoning", weight: 75, max_rows: 150}, {uri: "example:chat", weight: 25, max_rows: 50}]',
        "--gguf-quantize.strict",
        "false",
    ]


def test_line_runs_on_s3(s3_store: str, tmp_path: Path) -> None:
    import boto3

    variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    result = finemill(*quick(s3_store), cwd=tmp_path, FINEMILL_CACHE=str(tmp_path / "cache"), **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page["Contents"]]
    assert {key.split("/")[0] for key in keys if key.endswith("/manifest.json")} >= set(LINE)
    # Nothing of a bucket's artifacts lies in the working folder: only the cache holds copies.
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"cache", "mlflow.db", "mlflow.db.lock", "mlflow-artifacts", "finemill-logs"}
    assert not list(tmp_path.glob("mlflow-artifacts/**/*.safetensors"))


def test_interrupted_run_goes_on_from_the_last_finished_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finemill", *quick("store")]
    environment = {**os.environ, "FINEMILL_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.match(r"\[2/8\] chat-format +done", line):
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1].endswith("the same command goes on from the last finished step")
    again = finemill(*quick("store"), "--dry-run", cwd=tmp_path)
    assert json.loads(again.stdout)["train_qlora"]["max_steps"] == 4
    result = finemill(*quick("store"), cwd=tmp_path, FINEMILL_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\[\d/8\] (\S+) +reused", result.stderr, re.MULTILINE)[:2] == LINE[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-prep.sources", "[{uri: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["--base-model", "/nowhere/model"], "/nowhere/model"),
        (["--train-qlora.lora-r", "0"], "lora_r"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--store", "/proc/finemill"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    store = [] if "--store" in arguments else ["--store", "store"]
    result = finemill("run", "finetune", *store, *arguments, cwd=tmp_path, FINEMILL_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("finemill run: ")
    assert message in last
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("store/*/*/manifest.json"))
