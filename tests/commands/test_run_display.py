import io
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.manifest import Producer, new_manifest
from finemill.commands.run_display import RunDisplay, mix_table, print_results
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


def test_the_trained_mix_is_shown_by_rows_and_tokens() -> None:
    sources = {
        "problems": {"rows": 75.0, "tokens": 9000.0, "learned_tokens": 4000.0, "share": 0.75},
        "chats": {"rows": 25.0, "tokens": 1000.0, "learned_tokens": 1000.0, "share": 0.25},
    }
    assert mix_table(sources).splitlines() == [
        "trained on                    rows                  tokens          learned tokens   asked for",
        "problems               75   75.0%          9,000   90.0%          4,000   80.0%       75.0%",
        "chats                  25   25.0%          1,000   10.0%          1,000   20.0%       25.0%",
    ]
    unasked = {name: {key: own[key] for key in own if key != "share"} for name, own in sources.items()}
    assert not mix_table(unasked).splitlines()[1].endswith("75.0%")
