import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from finemill.artifacts.manifest import Producer, Reference
from finemill.config import StepConfig
from finemill.errors import StepError, TemporaryError, UserError
from finemill.runtime.context import StepContext
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact
from finemill.tracking.abandoned import PROCESS_TAG
from finemill.tracking.describe import StepDescription, base_model_tags, flatten, origin_tags
from finemill.tracking.parent import start_step
from finemill.tracking.pipeline import parent_run
from finemill.tracking.settings import Tracking
from finemill.tracking.step import RECORDER_VARIABLE

Prepare = Callable[..., StepResult]
_DATA_PREP = "finemill.components.data_prep.step.run"


@pytest.fixture
def prepare(folder_store: str, tmp_path: Path) -> Prepare:
    """Run `data-prep` on forty rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"{n}."}) + "\n" for n in range(40)))

    def prepare(run_id: str | None = None, **config: object) -> StepResult:
        config = {"sources": [{"uri": str(rows)}], **config}
        return run_step(
            "data-prep", store=folder_store, inputs={}, config=config, run_id=run_id, tracking=Tracking.of_environment()
        )

    return prepare


def runs(uri: str) -> list[Run]:
    """All runs, oldest first."""
    client = MlflowClient(uri)
    found = client.search_runs([item.experiment_id for item in client.search_experiments()])
    return sorted(found, key=lambda run: run.info.start_time)


def failing(error: BaseException) -> Callable[..., Mapping[str, float]]:
    def fail(**_: object) -> Mapping[str, float]:
        raise error

    return fail


def training(*, output_dir: Path, config: StepConfig, context: StepContext) -> Mapping[str, float]:
    """Stands for a training: what matters here is the curve that it reports."""
    for step in range(1, 6):
        context.recorder.log_metrics({"train/loss": 1 / step, "train/learning_rate": 1e-4}, step)
    (output_dir / "report.html").write_text("<p>report</p>")
    return {"train/loss": 0.2, "train/seconds": 3.0}


def test_the_next_step_ends_the_run_of_a_killed_one(tracking_uri: str, prepare: Prepare) -> None:
    prepare(seed=1)
    client = MlflowClient(tracking_uri)
    (first,) = runs(tracking_uri)
    killed = f"{first.data.tags[PROCESS_TAG].rpartition(' ')[0]} 1"
    client.set_tag(first.info.run_id, PROCESS_TAG, killed)
    client.update_run(first.info.run_id, status="RUNNING")
    prepare(seed=2)
    assert [run.info.status for run in runs(tracking_uri)] == ["KILLED", "FINISHED"]


def test_step_of_a_run_is_nested_under_its_parent(tracking_uri: str, prepare: Prepare) -> None:
    result = prepare("workflow-1", seed=3)
    parent, nested = runs(tracking_uri)
    assert (parent.info.run_name, parent.data.tags["finemill.run_id"]) == ("workflow-1", "workflow-1")
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert nested.data.tags["finemill.step"] == nested.info.run_name == "data-prep"
    assert nested.data.tags["finemill.output"] == str(result.reference)
    assert nested.data.params["seed"] == "3"
    assert nested.data.metrics == parent.data.metrics == result.manifest.metrics
    assert parent.info.status == nested.info.status == "FINISHED"
    assert not any("user" in key.lower() for run in (parent, nested) for key in run.data.tags)


def test_live_metrics_become_a_curve_and_small_reports_become_artifacts(
    tracking_uri: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_DATA_PREP, training)
    prepare()
    (run,) = runs(tracking_uri)
    client = MlflowClient(tracking_uri)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 6)]
    assert run.data.metrics == {"train/loss": 0.2, "train/learning_rate": 1e-4, "train/seconds": 3.0}
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_failed_step_ends_its_run_and_the_parent_until_a_retry_succeeds(
    tracking_uri: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_DATA_PREP, failing(UserError("row 7 is bad")))
    with pytest.raises(UserError):
        prepare("workflow-1")
    parent, failed = runs(tracking_uri)
    assert parent.info.status == failed.info.status == "FAILED"
    assert failed.data.tags["mlflow.note.content"] == "row 7 is bad"
    monkeypatch.setattr(_DATA_PREP, training)
    prepare("workflow-1")
    assert [run.info.status for run in runs(tracking_uri)] == ["FINISHED", "FAILED", "FINISHED"]


def test_two_first_steps_at_once_agree_on_one_parent(
    tracking_uri: str, folder_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=60)
    create_run = MlflowClient.create_run

    def create_together(self: MlflowClient, *args: Any, **kwargs: Any) -> Run:
        if "finemill.run_id" in kwargs["tags"]:
            together.wait()
        return create_run(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_run", create_together)
    client = MlflowClient(tracking_uri)
    client.create_experiment("finemill")
    made_by = Producer(step="data-prep", version="0", code="0")
    parents: list[str | None] = []

    def begin(name: str) -> None:
        step = StepDescription(name, {}, {}, "workflow-1")
        parents.append(start_step(client, Tracking(tracking_uri), folder_store, made_by, step).parent_id)

    threads = [threading.Thread(target=begin, args=(name,)) for name in ("data-prep", "eval")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(parents) == 2
    assert len(set(parents)) == 1
    assert sorted(run.info.run_name for run in runs(tracking_uri)) == ["data-prep", "eval", "workflow-1"]


def test_run_of_somebody_else_becomes_the_parent_and_stays_open(
    tracking_uri: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri)
    parent = client.create_run(client.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    prepare("workflow-1")
    nested = next(run for run in runs(tracking_uri) if run.info.run_id != parent)
    assert nested.data.tags["mlflow.parentRunId"] == parent
    assert (nested.info.status, client.get_run(parent).info.status) == ("FINISHED", "RUNNING")


def test_task_run_of_kfp_is_the_steps_own_and_stays_open(
    tracking_uri: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri)
    parent = client.create_run("0").info.run_id
    task = client.create_run("0", tags={"mlflow.parentRunId": parent}).info.run_id
    client.log_param(task, "seed", "as KFP wrote it")
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    result = prepare("workflow-1", seed=3)
    run = client.get_run(task)
    assert len(runs(tracking_uri)) == 2
    assert run.info.status == "RUNNING"
    assert run.data.metrics == result.manifest.metrics
    assert (run.data.params["seed"], run.data.params["dedup"]) == ("as KFP wrote it", "normalized")


@pytest.mark.parametrize(
    ("uri", "error", "line"),
    [
        ("http://127.0.0.1:9", TemporaryError, "MLflow at http://127.0.0.1:9 is out of reach"),
        ("http://user:secret@127.0.0.1:9", TemporaryError, "MLflow at http://127.0.0.1:9 is out of reach"),
        ("./mlruns", UserError, "'./mlruns' is no tracking server: give http"),
        ("sqlite:////proc/none/mlflow.db", UserError, "cannot be used as a database"),
    ],
)
def test_wrong_address_ends_the_step_before_it_computes(
    uri: str, error: type[StepError], line: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(_DATA_PREP, failing(AssertionError("computed")))
    with pytest.raises(error, match=line) as caught:
        prepare()
    assert "secret" not in str(caught.value)


def test_mlflow_that_breaks_during_the_step_costs_a_line_and_not_the_result(
    tracking_uri: str, tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def break_database(**arguments: Any) -> Mapping[str, float]:
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("DROP TABLE tags")
        return training(**arguments)

    monkeypatch.setattr(_DATA_PREP, break_database)
    result = prepare()
    assert (fetch_artifact(result.reference)[0] / "report.html").is_file()
    assert "warning: not everything is recorded in MLflow" in capsys.readouterr().err


def test_reused_steps_import_no_mlflow(
    tracking_uri: str, folder_store: str, prepare: Prepare, trained: Callable[..., dict[str, str]]
) -> None:
    line = trained("one")
    version = str(
        run_step("register", store=folder_store, inputs=line, config={}, tracking=Tracking.of_environment()).reference
    )
    judged = {"version": version, "evaluation": line["evaluation"]}
    run_step("promote", store=folder_store, inputs=judged, config={}, tracking=Tracking.of_environment())
    rows = prepare().manifest.config
    script = f"""
import sys
from finemill.runtime.run import run_step
from finemill.tracking.settings import Tracking
where = {{"store": {folder_store!r}, "tracking": Tracking.of_environment()}}
for name, inputs, config in (
    ("data-prep", {{}}, {rows!r}), ("register", {line!r}, {{}}), ("promote", {judged!r}, {{}})
):
    assert run_step(name, inputs=inputs, config=config, **where).reused, name
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pipeline_run_records_what_the_steps_say(
    tracking_uri: str, tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMILL_EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(RECORDER_VARIABLE, "events")
    monkeypatch.setattr(_DATA_PREP, training)
    reference = prepare("job-1", seed=1).reference
    # MLflow orders runs by the millisecond in which they began.
    time.sleep(0.01)
    prepare("job-1", seed=1)
    time.sleep(0.01)
    monkeypatch.setattr(_DATA_PREP, failing(UserError("row 7 is bad")))
    with pytest.raises(UserError):
        prepare("job-1", seed=2)

    class Config(StepConfig):
        base_model: str = "builtin:tiny-qwen3"

    def follow() -> None:
        with parent_run("finetune", Config(), Tracking(tracking_uri)) as run:
            for line in (tmp_path / "events.jsonl").read_text().splitlines():
                run.record(json.loads(line))
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        follow()
    found = {run.info.run_id: run for run in runs(tracking_uri)}
    parent = next(run for run in found.values() if run.info.run_name == "finetune")
    steps = [run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.data.params == {"base_model": "builtin:tiny-qwen3"}
    assert (parent.info.status, parent.data.tags["finemill.run_id"]) == ("FAILED", "job-1")
    assert [step.info.status for step in steps] == ["FINISHED", "FINISHED", "FAILED"]
    assert [step.data.tags.get("finemill.reused") for step in steps] == [None, "true", None]
    assert {step.data.tags.get("finemill.output") for step in steps} == {str(reference), None}
    history = MlflowClient(tracking_uri).get_metric_history(steps[0].info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("recorder", ["", "events"])
def test_the_warnings_of_a_step_are_a_tag_of_its_run(
    recorder: str, tracking_uri: str, tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(**arguments: Any) -> Mapping[str, float]:
        for split in ("train", "test"):
            logging.getLogger("finemill.components.data_prep.step").warning("%s: 3 rows left out", split)
        return training(**arguments)

    monkeypatch.setenv("FINEMILL_EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(RECORDER_VARIABLE, recorder)
    monkeypatch.setattr(_DATA_PREP, warn)
    prepare()
    if recorder:
        prepare()
        with parent_run("finetune", StepConfig(), Tracking(tracking_uri)) as run:
            for line in (tmp_path / "events.jsonl").read_text().splitlines():
                run.record(json.loads(line))
    tags = [run.data.tags for run in runs(tracking_uri) if "finemill.step" in run.data.tags]
    expected = ["train: 3 rows left out\ntest: 3 rows left out"] * (2 if recorder else 1)
    assert [tag["finemill.warnings"] for tag in tags] == expected


@pytest.mark.parametrize("recorder", ["", "events"])
def test_a_failed_step_s_warnings_are_a_tag_of_its_run(
    recorder: str, tracking_uri: str, tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(**_: object) -> Mapping[str, float]:
        logging.getLogger("finemill.components.data_prep.step").warning("train: 3 rows left out")
        raise UserError("no row is left")

    monkeypatch.setenv("FINEMILL_EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(RECORDER_VARIABLE, recorder)
    monkeypatch.setattr(_DATA_PREP, warn)
    with pytest.raises(UserError, match="no row is left"):
        prepare()
    if recorder:
        with parent_run("finetune", StepConfig(), Tracking(tracking_uri)) as run:
            for line in (tmp_path / "events.jsonl").read_text().splitlines():
                run.record(json.loads(line))
    (tags,) = (run.data.tags for run in runs(tracking_uri) if "finemill.step" in run.data.tags)
    assert tags["finemill.warnings"] == "train: 3 rows left out"


def test_parameters_are_flat_and_hold_no_credentials() -> None:
    values = {"lora_r": 16, "merge": {"dtype": "bfloat16", "none": None}, "uris": ["https://me:pw@host/x"]}
    assert flatten(values) == {
        "lora_r": "16",
        "merge.dtype": "bfloat16",
        "merge.none": "None",
        "uris": '["https://host/x"]',
    }


@pytest.mark.parametrize(
    ("reference", "tags"),
    [
        ("builtin:tiny-qwen3", {"base_model.id": "builtin:tiny-qwen3"}),
        ("hf://Qwen/Qwen3-8B@abc", {"base_model.id": "Qwen/Qwen3-8B", "base_model.revision": "abc"}),
        ("/home/somebody/models/mine", {"base_model.id": "mine"}),
        (
            str(Reference("s3://bucket/merge/1234", "a" * 64)),
            {"base_model.id": "1234", "base_model.revision": f"sha256:{'a' * 64}"},
        ),
    ],
)
def test_base_model_is_named_without_the_folders_around_it(reference: str, tags: dict[str, str]) -> None:
    assert base_model_tags(reference) == tags


DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("image", "tags"),
    [
        (None, {}),
        ("r.example/finemill-cpu:0.1.0", {"image": "r.example/finemill-cpu:0.1.0"}),
        (f"finemill-cpu@{DIGEST}", {"image": f"finemill-cpu@{DIGEST}", "image.digest": DIGEST}),
        (f"r:5000/finemill-cpu:1@{DIGEST}", {"image": f"r:5000/finemill-cpu:1@{DIGEST}", "image.digest": DIGEST}),
    ],
)
def test_image_has_a_digest_only_where_its_name_tells_one(image: str | None, tags: dict[str, str]) -> None:
    made_by = Producer(step="eval", version="0.1.0", code="c", git_sha="c0ffee", image=image)
    assert origin_tags(made_by) == {"git.sha": "c0ffee", "finemill.version": "0.1.0", **tags}
