import io
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.manifest import Producer, new_manifest
from finemill.commands.run_display import RunDisplay, print_results
from finemill.storage.store import publish_artifact, staging_folder

STEPS = ("data-prep", "chat-format")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(name: str, text: str, **details: Any) -> dict[str, Any]:
    return {"step": "chat-format", "event": name, "text": text, **details}


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_warning_stays_on_the_screen_with_its_step(stream: io.StringIO) -> None:
    display = RunDisplay(STEPS, stream)
    display.show(event("progress", "train: 10 rows"))
    display.show(event("warning", "train: 3 left out of 10 rows (too_long 3)"))
    display.show(event("progress", "test: 2 rows"))
    display.show(event("done", "file:///store/chat-format/1@sha256:0", seconds=1.0))
    kept = [line.split("\r\033[2K")[-1] for line in stream.getvalue().split("\n")]
    assert "[2/2] chat-format  warning: train: 3 left out of 10 rows (too_long 3)" in kept
    assert kept[-2] == "[2/2] chat-format  done      1.0 s  file:///store/chat-format/1"


def test_the_results_end_with_every_step_s_warnings(tmp_path: Path) -> None:
    references = {}
    for step, warnings in (("data-prep", ()), ("chat-format", ("train: 3 left out of 10 rows (too_long 3)",))):
        uri = f"{tmp_path.as_uri()}/{step}"
        folder = staging_folder(uri)
        manifest = new_manifest("rows", folder, Producer(step=step, version="0", code="0"), warnings=warnings)
        publish_artifact(folder, uri, manifest)
        references[step] = f"{uri}@sha256:{manifest.digest}"
    print_results(references, "sqlite:///mlflow.db", stream := io.StringIO())
    lines = stream.getvalue().splitlines()
    assert lines[lines.index("warnings") + 1 :][:2] == ["chat-format   train: 3 left out of 10 rows (too_long 3)", ""]
