"""A line that is interrupted goes on where it was."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.line.commands import LINE, SHORT, finemill, finemill_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
RUN = ["run", "finetune", "--store", "store", *SHORT]


def interrupt(folder: Path, moment: str) -> list[str]:
    """Start the line, send SIGINT a second after a line of the display. Returns: the display."""
    environment = {**os.environ, "FINEMILL_CACHE": str(folder / "cache")}
    shown = []
    with subprocess.Popen(
        finemill_command(*RUN),
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            shown.append(line)
            if re.match(moment, line):
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        shown += process.stderr.readlines()
    assert process.returncode == 130
    assert shown[-1].strip().endswith("the same command goes on from the last finished step")
    return shown


def test_interrupted_run_goes_on_from_the_last_finished_step(tmp_path: Path) -> None:
    interrupt(tmp_path, r"\[2/8\] chat-format +done")
    again = finemill(*RUN, "--dry-run", cwd=tmp_path)
    assert json.loads(again.stdout)["train_qlora"]["max_steps"] == 4
    shown = "".join(interrupt(tmp_path, r"\[2/8\] chat-format +reused"))
    assert re.findall(r"^\[\d/8\] (\S+) +reused", shown, re.MULTILINE) == LINE[:2]
    assert not list(tmp_path.glob("store/train-qlora/*/manifest.json"))
