import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Reference
from finemill.errors import UserError
from finemill.runtime.run import run_step
from finemill.storage.base import local_path
from finemill.storage.store import fetch_artifact


@pytest.fixture
def config(tmp_path: Path) -> dict[str, object]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in range(40))
    )
    return {"sources": [{"uri": str(rows)}]}


def names_in(store: str) -> list[str]:
    """Every file of a folder store but the writable-probe's own folder."""
    folder = local_path(store)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_same_call_again_is_reused(store: str, config: dict[str, object]) -> None:
    first = run_step("data-prep", store=store, inputs={}, config=config)
    again = run_step("data-prep", store=store, inputs={}, config=config)
    assert (first.reused, again.reused) == (False, True)
    assert first.reference == again.reference
    folder, manifest = fetch_artifact(first.reference)
    assert (folder / "train.parquet").is_file()
    assert manifest.kind == "rows"
    assert manifest.config["sources"] == [{**manifest.config["sources"][0], "uri": config["sources"][0]["uri"]}]  # type: ignore[index]


def test_an_input_of_another_kind_is_refused_before_anything_is_read(
    folder_store: str, config: dict[str, object]
) -> None:
    rows = run_step("data-prep", store=folder_store, inputs={}, config=config).reference
    base = {"base_model": "builtin:tiny-qwen3"}
    expected = r"input dataset: .* is of the kind 'rows', not 'dataset': pass the reference that chat-format printed"
    with pytest.raises(UserError, match=expected):
        run_step("train-qlora", store=folder_store, inputs={**base, "dataset": str(rows)}, config={})
    with pytest.raises(UserError, match="'adapter': pass the reference that train-qlora or train-dpo printed"):
        run_step("merge", store=folder_store, inputs={**base, "adapter": str(rows)}, config={})


def test_other_config_and_changed_data_give_another_output(folder_store: str, config: dict[str, object]) -> None:
    first = run_step("data-prep", store=folder_store, inputs={}, config=config)
    other = run_step("data-prep", store=folder_store, inputs={}, config={**config, "seed": 1})
    source = Path(config["sources"][0]["uri"])  # type: ignore[index]
    source.write_text(source.read_text() + json.dumps({"prompt": "More?", "completion": "Yes."}) + "\n")
    changed = run_step("data-prep", store=folder_store, inputs={}, config=config)
    assert len({first.reference.uri, other.reference.uri, changed.reference.uri}) == 3


def test_changed_code_gives_another_output(
    folder_store: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_step("data-prep", store=folder_store, inputs={}, config=config)
    monkeypatch.setattr("finemill.runtime.code_version.code_digest", lambda step: "another")
    second = run_step("data-prep", store=folder_store, inputs={}, config=config)
    assert not second.reused
    assert second.reference.uri != first.reference.uri


@pytest.mark.parametrize(
    "failure", [UserError("bad rows"), RuntimeError("bug"), OSError(28, "No space left on device")]
)
def test_failed_step_leaves_nothing(
    failure: Exception, folder_store: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*, output_dir: Path, **_: object) -> Mapping[str, float]:
        (output_dir / "half").write_text("half")
        raise failure

    monkeypatch.setattr("finemill.components.data_prep.step.run", fail)
    expected = UserError if isinstance(failure, OSError | UserError) else RuntimeError
    with pytest.raises(expected, match=r"bad rows|bug|No space left on device \(.*/store/"):
        run_step("data-prep", store=folder_store, inputs={}, config=config)
    assert names_in(folder_store) == []


def test_metric_that_is_not_finite_is_an_error(
    folder_store: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemill.components.data_prep.step.run", lambda **_: {"rows/loss": float("nan")})
    with pytest.raises(UserError, match="metric 'rows/loss' is nan"):
        run_step("data-prep", store=folder_store, inputs={}, config=config)


def test_bad_calls_are_user_errors(folder_store: str, config: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"unknown step 'data'; the steps are .*data-prep"):
        run_step("data", store=folder_store, inputs={}, config=config)
    with pytest.raises(UserError, match="unknown key 'sead'"):
        run_step("data-prep", store=folder_store, inputs={}, config={**config, "sead": 1})
    with pytest.raises(UserError, match="chat-format: input missing rows; it takes rows, base_model"):
        run_step("chat-format", store=folder_store, inputs={"base_model": "builtin:tiny-qwen3"}, config={})
    with pytest.raises(UserError, match="input unknown rows; it takes no inputs"):
        run_step("data-prep", store=folder_store, inputs={"rows": "x"}, config=config)


def test_damaged_input_stops_the_step(folder_store: str, config: dict[str, object]) -> None:
    rows = run_step("data-prep", store=folder_store, inputs={}, config=config).reference
    (local_path(rows.uri) / "train.parquet").write_bytes(b"cut")
    inputs = {"rows": str(rows), "base_model": "builtin:tiny-qwen3"}
    with pytest.raises(UserError, match=r"damaged artifact: .*train\.parquet has 3 bytes"):
        run_step("chat-format", store=folder_store, inputs=inputs, config={})
    gone = Reference(f"{rows.uri}-gone", rows.digest)
    with pytest.raises(UserError, match="no complete artifact"):
        run_step("chat-format", store=folder_store, inputs={**inputs, "rows": str(gone)}, config={})


def test_kill_9_leaves_nothing_published_and_the_next_call_succeeds(
    folder_store: str, config: dict[str, object], tmp_path: Path
) -> None:
    script = (
        "import sys, time, json\n"
        "import finemill.components.data_prep.step as module\n"
        "def slow(*, output_dir, **_):\n"
        "    (output_dir / 'half').write_text('half'); print('half', flush=True); time.sleep(60)\n"
        "module.run = slow\n"
        "from finemill.runtime.run import run_step\n"
        "run_step('data-prep', store=sys.argv[1], inputs={}, config=json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, folder_store, json.dumps(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not [name for name in names_in(folder_store) if ".staging" not in name]
    started = time.time()
    result = run_step("data-prep", store=folder_store, inputs={}, config=config)
    assert not result.reused
    assert local_path(result.reference.uri).stat().st_mtime >= started - 1


def warn_and_prepare(*, output_dir: Path, **_: object) -> Mapping[str, float]:
    logging.getLogger("finemill.kernels.accelerate").warning("model runs unchanged: %s", "no GPU")
    logging.getLogger("finemill.kernels.accelerate").warning("model runs unchanged: %s", "no GPU")
    (output_dir / "rows").write_text("rows")
    return {}


def test_warnings_are_said_once_kept_in_the_manifest_and_said_again_of_a_reused_output(
    folder_store: str,
    config: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FINEMILL_EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setattr("finemill.components.data_prep.step.run", warn_and_prepare)
    for end in ("done", "reused"):
        result = run_step("data-prep", store=folder_store, inputs={}, config=config)
        said = capsys.readouterr().err.splitlines()
        assert said == [
            "data-prep: started",
            "data-prep: warning: model runs unchanged: no GPU",
            f"data-prep: {end}: {result.reference}",
        ]
    assert fetch_artifact(result.reference)[1].warnings == ["model runs unchanged: no GPU"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "warning", "done", "started", "warning", "reused"]


def test_a_failed_step_leaves_its_line_to_the_caller(
    folder_store: str, config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError):
        run_step("data-prep", store=folder_store, inputs={}, config={**config, "sead": 1})
    assert capsys.readouterr().err == "data-prep: started\n"
