"""Processes are killed at any moment: nothing is half published, nothing stays behind, a repeat gives the same."""

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest

from finemill.artifacts.manifest import Reference
from finemill.storage.store import fetch_artifact, list_artifacts, read_manifest
from tests.faults.conftest import rounds
from tests.line.commands import SHORT, finemill, finemill_command

LINE = ["run", "finetune", "--store", "store", *SHORT]
COMPUTED = ("data-prep", "chat-format", "train-qlora", "eval", "merge", "gguf-quantize")
"""Steps whose output depends on nothing but their inputs: a repeat has the digest of the first run."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KEPT_IN_TMP = (f"finemill-{os.getuid()}", f"torchinductor_{getpass.getuser()}")
"""Of a step that was killed the next one removes what is in the first, torch makes the second."""
ROWS = ["data-prep", "--sources", '[{uri: "example:reasoning", max_rows: 2000}]']


def killed(arguments: list[str], folder: Path, number: int, after_s: float, variables: Mapping[str, str]) -> str:
    """Start a command, send it a signal after a while. Returns: what it printed on standard error by then."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_TRACKING"))}
    with subprocess.Popen(
        finemill_command(*arguments), cwd=folder, env={**environment, **variables}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        return process.stderr.read()


def processes_in(folder: Path) -> list[str]:
    """The command lines of processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder) and (process / "cmdline").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return found


def digests(store: str) -> dict[str, set[str]]:
    """The digests of what each step has published, every file of it verified."""
    found: dict[str, set[str]] = {}
    for step in COMPUTED:
        for uri in list_artifacts(f"{store}/{step}"):
            manifest = read_manifest(uri)
            assert manifest is not None
            fetch_artifact(Reference(uri, manifest.digest))
            found.setdefault(step, set()).add(manifest.digest)
    return found


def test_a_line_that_is_killed_loses_nothing_and_leaves_nothing(tmp_path: Path, rng: Random) -> None:
    import sqlite3

    cache = {"FINEMILL_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    calm = tmp_path / "calm"
    calm.mkdir()
    began = time.monotonic()
    first = finemill(*LINE, cwd=calm, **cache)
    assert first.returncode == 0, first.stderr
    took = time.monotonic() - began
    expected = digests((calm / "store").as_uri())
    left = rounds(40)
    while left > 0:
        folder = tmp_path / f"killed-{left}"
        folder.mkdir()
        for _ in range(min(left, 10)):
            left -= 1
            number = rng.choice(SIGNALS)
            shown = killed(LINE, folder, number, rng.uniform(0.2, took / 3), cache)
            assert "Traceback" not in shown, (number, shown)
            deadline = time.monotonic() + 60
            while processes_in(folder) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not processes_in(folder), f"left working after {signal.Signals(number).name}"
        last = finemill(*LINE, cwd=folder, **cache)
        assert last.returncode == 0, last.stderr
        assert digests((folder / "store").as_uri()) == expected
        with sqlite3.connect(folder / "store" / "mlflow.db") as database:
            open_runs = database.execute("select count(*) from runs where status = 'RUNNING'").fetchone()
        assert open_runs == (0,)
        swept = finemill("gc", "--store", "store", cwd=folder, **cache)
        assert swept.returncode == 0, swept.stderr
        assert digests((folder / "store").as_uri()) == expected
        assert not [path.name for path in (tmp_path / "tmp").iterdir() if path.name not in KEPT_IN_TMP]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_step_that_is_killed_is_repeated_with_the_same_digest(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, rng: Random
) -> None:
    store: str = request.getfixturevalue(f"{kind}_store")
    variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    variables["FINEMILL_CACHE"] = str(tmp_path / "cache")
    began = time.monotonic()
    calm = finemill(*ROWS, "--store", f"{store}/calm", cwd=tmp_path, **variables)
    took = time.monotonic() - began
    assert calm.returncode == 0, calm.stderr
    expected = calm.stdout.strip().rpartition("@")[2]
    for number in range(rounds(80)):
        place = ["--store", f"{store}/{number // 4}"]
        shown = killed([*ROWS, *place], tmp_path, rng.choice(SIGNALS), rng.uniform(0.2, took * 1.1), variables)
        assert "Traceback" not in shown, shown
        digests(f"{store}/{number // 4}")
        if number % 4 == 3:
            again = finemill(*ROWS, *place, cwd=tmp_path, **variables)
            assert again.returncode == 0, again.stderr
            assert again.stdout.strip().rpartition("@")[2] == expected
    assert not processes_in(tmp_path)
