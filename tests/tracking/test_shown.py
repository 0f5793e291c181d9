import json
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from finemill.artifacts.manifest import Reference
from finemill.storage.store import read_artifact
from finemill.tracking.describe import StepDescription
from finemill.tracking.record import StepRecord


def test_the_parent_run_tells_the_verdict_and_the_evaluation_is_a_table(
    tracking_uri: str, trained: Callable[..., dict[str, str]], publish: Callable[..., str], tmp_path: Path
) -> None:
    client = MlflowClient(tracking_uri)
    parent = client.create_run("0").info.run_id
    evaluation = trained("one", rows=12)["evaluation"]
    decided = publish("decision", {"decision.md": "# finemill version 1: @champion, the first", "decision.json": "{}"})
    for name, text in (("eval", evaluation), ("promote", decided), ("eval", evaluation)):
        reference = Reference.parse(text)
        step = StepRecord.start(client, "0", parent, StepDescription(name, {}, {}))
        step.finish(reference, read_artifact(reference))
        if name == "eval":
            table = json.loads(Path(client.download_artifacts(step.run_id, "eval_results_table.json")).read_text())
            assert len(table["data"]) == 24
            assert table["columns"][:3] == ["id", "source", "model"]
            tag = client.get_run(step.run_id).data.tags["mlflow.loggedArtifacts"]
            assert json.loads(tag) == [{"path": "eval_results_table.json", "type": "table"}]
    note = client.get_run(parent).data.tags["mlflow.note.content"].splitlines()
    assert note[0] == "# finemill version 1: @champion, the first"
    assert f"runs/{parent}/artifacts/report.html" in note[2]
    assert note[4:] == ["# one"]
    assert {item.path for item in client.list_artifacts(parent)} == {"decision.md"}
