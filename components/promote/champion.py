"""The champion's scores on the rows that the new version was scored on."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from finemill.components.artifacts import Manifest, Reference
from finemill.components.context import StepContext
from finemill.components.errors import StepError, TemporaryError, UserError
from finemill.components.promote.scores import Scores
from finemill.components.registry import Version
from finemill.components.storage.store import fetch_artifact, read_artifact

# Settings of `eval` that change its speed and its report only.
_NOT_SCORED = ("batch_size", "report_rows")


def champion_scores(champion: Version, evaluation: Manifest, context: StepContext) -> tuple[Scores, Reference]:
    """The champion's scores, comparable with those of `evaluation`: its own, or new ones on the same rows.

    Raises: UserError: the champion has to be scored again, and cannot be here.
    """
    standing = champion.artifact("evaluation")
    if standing is not None:
        try:
            folder, manifest = fetch_artifact(standing)
        except UserError as error:
            context.recorder.log_progress(f"the champion's evaluation cannot be read: {error}")
        else:
            if test_of(manifest) == test_of(evaluation):
                return Scores(folder), standing
    return score_again(champion, evaluation, context)


def test_of(evaluation: Manifest) -> tuple[str, str]:
    """What an evaluation's scores depend on besides the model: the dataset's digest and how answers are generated."""
    dataset = Reference.parse(evaluation.parents["dataset"]).digest
    config = {key: value for key, value in evaluation.config.items() if key not in _NOT_SCORED}
    return dataset, json.dumps(config, sort_keys=True)


def score_again(champion: Version, evaluation: Manifest, context: StepContext) -> tuple[Scores, Reference]:
    """Run the step `eval` on the champion's adapter with the new version's dataset and configuration.

    In a process of its own, which gives a GPU back, and as an ordinary artifact: another attempt finds it.
    """
    who = f"champion version {champion.number}"
    adapter = champion.artifact("adapter")
    if adapter is None:
        raise UserError(
            f"promote: {who} was scored on other rows and its adapter is not known: register it with finemill, or "
            "remove the alias champion"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"promote: {who} was scored on other rows than the new version, and scoring it again needs torch, which is "
            "not installed here: run promote where train-qlora runs (in a cluster on the train image)"
        )
    context.recorder.log_progress(f"{who} was scored on other rows: scoring it on the new version's")
    reference = _run_eval(
        {
            "--dataset": evaluation.parents["dataset"],
            "--base-model": read_artifact(adapter).parents["base_model"],
            "--adapter": str(adapter),
            "--store": context.store,
            "--config-json": json.dumps(evaluation.config),
        },
        who,
    )
    return Scores(fetch_artifact(reference)[0]), reference


def _run_eval(options: dict[str, str], who: str) -> Reference:
    # Its own run is not a step of this pipeline run: it is neither displayed nor recorded as one.
    hidden = ("FINEMILL_EVENTS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.TemporaryDirectory(prefix="finemill-champion-") as folder:
        output = Path(folder, "reference")
        command = [sys.executable, "-m", "finemill", "eval", "--output-file", str(output)]
        command += [part for option in options.items() for part in option]
        exit_code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
        if exit_code == 0:
            return Reference.parse(output.read_text())
    kind = {UserError.exit_code: UserError, TemporaryError.exit_code: TemporaryError}.get(exit_code, StepError)
    raise kind(f"promote: scoring {who} again failed with exit code {exit_code}; its own lines are above")
