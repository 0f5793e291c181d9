"""What people look at in MLflow's pages: reports, an evaluation's table, and on the parent run the verdict first."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finemill.artifacts.evaluation import read_samples, shown_columns
from finemill.artifacts.files import (
    DATA_CARD_FILE,
    DATA_CARD_PAGE,
    DATA_CARD_TEXT,
    DECISION_FILE,
    DECISION_TEXT,
    METRICS_FILE,
    REPORT_PAGE,
    REPORT_TEXT,
    SAMPLES_FILE,
)
from finemill.artifacts.manifest import Manifest, Reference
from finemill.storage.store import fetch_artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Models never go through MLflow.
ARTIFACT_NAMES = (
    REPORT_PAGE,
    REPORT_TEXT,
    METRICS_FILE,
    DECISION_TEXT,
    DECISION_FILE,
    DATA_CARD_PAGE,
    DATA_CARD_TEXT,
    DATA_CARD_FILE,
)
ON_PARENT = (REPORT_PAGE, DECISION_TEXT)
"""Also shown on the run of the whole pipeline, which is the one that people open."""
NOTES = (DECISION_TEXT, REPORT_TEXT)
"""Texts of the parent's description, the verdict of the whole first."""
MAX_ARTIFACT_BYTES = 8 * 2**20
TABLE_FILE = "eval_results_table.json"
"""The name of `mlflow.evaluate`'s own table, which MLflow's page compares across runs."""
NOTE_TAG = "mlflow.note.content"
_TABLES_TAG = "mlflow.loggedArtifacts"
_MOST_TABLE_ROWS = 2000
_MAX_NOTE = 5000


def show_files(
    client: "MlflowClient", run_id: str, parent_id: str | None, reference: Reference, manifest: Manifest
) -> None:
    """Record the small files of a step's output with its run, and what people want first with the parent's."""
    names = [
        name for name in ARTIFACT_NAMES if name in manifest.files and manifest.files[name].size <= MAX_ARTIFACT_BYTES
    ]
    is_evaluation = manifest.kind == "evaluation" and SAMPLES_FILE in manifest.files
    if not names and not is_evaluation:
        return
    folder, _ = fetch_artifact(reference)
    for name in names:
        client.log_artifact(run_id, str(folder / name))
    if is_evaluation:
        _log_table(client, run_id, folder)
    if parent_id:
        for name in ON_PARENT:
            if name in names:
                client.log_artifact(parent_id, str(folder / name))
        for name in NOTES:
            if name in names:
                _note(client, parent_id, (folder / name).read_text(encoding="utf-8"), on_top=name == DECISION_TEXT)


def _note(client: "MlflowClient", run_id: str, text: str, *, on_top: bool) -> None:
    """Add a text to the run's description once; with its first, a link to the report."""
    run = client.get_run(run_id)
    standing = run.data.tags.get(NOTE_TAG, "")
    if text in standing:
        return
    if not standing:
        place = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts/{REPORT_PAGE}"
        standing = f"[The report with all answers]({place})"
    parts = [text, standing] if on_top else [standing, text]
    client.set_tag(run_id, NOTE_TAG, "\n\n".join(part.strip() for part in parts)[:_MAX_NOTE])


def _log_table(client: "MlflowClient", run_id: str, folder: Path) -> None:
    """The samples as the table that MLflow's page of evaluations reads."""
    samples = read_samples(folder)[:_MOST_TABLE_ROWS]
    rows = [shown_columns(sample) for sample in samples]
    table = {"columns": list(rows[0]) if rows else [], "data": [list(row.values()) for row in rows]}
    text = json.dumps(table, ensure_ascii=False)
    if len(text.encode()) > MAX_ARTIFACT_BYTES:
        return
    with tempfile.TemporaryDirectory(prefix="finemill-table-") as temporary:
        path = Path(temporary, TABLE_FILE)
        path.write_text(text, encoding="utf-8")
        client.log_artifact(run_id, str(path))
    client.set_tag(run_id, _TABLES_TAG, json.dumps([{"path": TABLE_FILE, "type": "table"}]))
