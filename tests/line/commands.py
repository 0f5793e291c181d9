"""The line's commands as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

from finemill.pipelines.finetune import FINETUNE
from finemill.pipelines.local import for_this_machine

LINE = [task.name for task in for_this_machine(FINETUNE).tasks]
SHORT = [
    "--train-qlora.max-steps",
    "4",
    "--data-prep.sources",
    '[{uri: "example:reasoning", weight: 75, max_rows: 150}, {uri: "example:chat", weight: 25, max_rows: 50}]',
    "--eval.max-rows",
    "16",
    "--eval.max-new-tokens",
    "32",
    "--gguf-quantize.quantizations",
    "[Q8_0]",
    "--gguf-quantize.verify-rows",
    "4",
    "--gguf-quantize.max-new-tokens",
    "32",
]
"""A few training steps, few and short answers, one file: all but the scores is as in the default."""


def finemill_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "finemill", *arguments]


def finemill(*arguments: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_TRACKING"))}
    return subprocess.run(
        finemill_command(*arguments),
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
