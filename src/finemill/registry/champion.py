"""A champion's scores on the rows that a new version was scored on: those that stand, or new ones."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemill.artifacts.manifest import Manifest, Reference
from finemill.errors import UserError, kind_of
from finemill.registry.snapshot import ARTIFACT_TAG, EVALUATION_TAG, RegisteredModel, Version
from finemill.runtime.context import StepContext
from finemill.runtime.processes import step_arguments
from finemill.storage.store import fetch_artifact, read_artifact
from finemill.tracking.server import open_client, readable_errors
from finemill.tracking.settings import ADOPT_VARIABLE, TRACKING_VARIABLE

# Settings of `eval` that change nothing that base and tuned score.
_NOT_SCORED = ("batch_size", "report_rows", "device", "force", "models")


def comparable_evaluation(
    model: RegisteredModel, champion: Version, evaluation: Manifest, context: StepContext
) -> Reference:
    """An evaluation of `champion` on the rows and with the settings of `evaluation`.

    Raises: UserError: the champion has to be scored again, and cannot be here.
    """
    return _standing_evaluation(champion, evaluation, context) or _score_again(model, champion, evaluation, context)


def _standing_evaluation(champion: Version, evaluation: Manifest, context: StepContext) -> Reference | None:
    """The one it was registered with, or one that was made for an earlier comparison."""
    test = _test_of(evaluation)
    for text in (champion.tags.get(f"{ARTIFACT_TAG}evaluation"), champion.tags.get(_tag(test))):
        if not text:
            continue
        try:
            reference = Reference.parse(text)
            manifest = fetch_artifact(reference)[1]
        except UserError as error:
            context.recorder.log_progress(f"an evaluation of the champion cannot be read: {error}")
        else:
            if _test_of(manifest) == test:
                return reference
    return None


def _test_of(evaluation: Manifest) -> str:
    """A digest of what scores depend on besides the model: dataset, how answers are generated, code that scores."""
    dataset = Reference.parse(evaluation.parents["dataset"]).digest
    config = {key: value for key, value in evaluation.config.items() if key not in _NOT_SCORED}
    material = [dataset, config, evaluation.producer.code]
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:20]


def _tag(test: str) -> str:
    return f"{EVALUATION_TAG}{test}"


def _score_again(model: RegisteredModel, champion: Version, evaluation: Manifest, context: StepContext) -> Reference:
    """Run the step `eval` on the champion's adapter with the new version's dataset and configuration.

    In a process of its own, which gives a GPU back, and as an ordinary artifact that the registry remembers: another
    comparison finds it.
    """
    who = f"champion version {champion.number}"
    adapter = champion.artifact("adapter")
    if adapter is None:
        raise UserError(
            f"{who} was scored on other rows and its adapter is not known: register it with finemill, or remove the "
            "alias champion"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{who} was scored on other rows than the new version, and scoring it again needs torch, which is not "
            "installed here: run score-champion where train-qlora runs, then this again"
        )
    context.recorder.log_progress(f"{who} was scored on other rows: scoring it on the new version's")
    inputs = {
        "dataset": evaluation.parents["dataset"],
        "base_model": read_artifact(adapter).parents["base_model"],
        "adapter": str(adapter),
    }
    config = {key: value for key, value in evaluation.config.items() if key != "models"}
    reference = _run_eval(inputs, context.store, config, who)
    with readable_errors(model.registry_uri):
        tag = _tag(_test_of(evaluation))
        open_client(model.registry_uri).set_model_version_tag(model.name, str(champion.number), tag, str(reference))
    return reference


def _run_eval(inputs: Mapping[str, str], store: str, config: Mapping[str, Any], who: str) -> Reference:
    # Its own run is not a step of this pipeline run: it is neither displayed nor recorded as one.
    hidden = ("FINEMILL_EVENTS", TRACKING_VARIABLE, ADOPT_VARIABLE)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.TemporaryDirectory(prefix="finemill-champion-") as folder:
        output = Path(folder, "reference")
        arguments = step_arguments("eval", store=store, inputs=inputs, config=config, output_file=output)
        command = [sys.executable, "-P", "-m", "finemill", *arguments]
        exit_code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
        if exit_code == 0:
            return Reference.parse(output.read_text())
    raise kind_of(exit_code)(f"scoring {who} again failed with exit code {exit_code}; its own lines are above")
