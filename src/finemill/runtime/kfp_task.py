"""The body of every KFP component: run the step, fill KFP's outputs."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemill.credentials import clean_credentials
from finemill.errors import TemporaryError
from finemill.runtime.catalog import get_step
from finemill.runtime.failure import describe, report
from finemill.runtime.run import StepResult, run_step
from finemill.runtime.terminal_failure import TerminalFailure
from finemill.runtime.typed_values import check_typed
from finemill.storage.store import fetch_artifact
from finemill.tracking.progress import silence_progress_bars
from finemill.tracking.settings import TRACKING_VARIABLE, Tracking
from finemill.transport import unpack

# KFP sets it when a retry policy is set; the attempts of a run that a person has retried count from 0 again.
ATTEMPT_VARIABLE = "KFP_RETRY_INDEX"
POD_VARIABLE = "KUBERNETES_SERVICE_HOST"
"""Set in every pod: there arguments have gone through Kubernetes."""
TRACKING_PREFIX = "FINEMILL_"
"""Before the names of the tracking server's settings in a pod of KFP. KFP's MLflow plugin sets `MLFLOW_TRACKING_URI`
itself, and Kubernetes refuses a pod in which one variable has both a value and a reference to a ConfigMap."""


def run_kfp_task(
    name: str,
    *,
    store: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    run_id: str,
    reference_path: str,
    manifest: Any,
    metrics: Any,
    shown: Mapping[str, Any] | None = None,
) -> bool:
    """Run the step `name` and write its reference, manifest and metrics where KFP wants them.

    KFP turns every exit code into 1 and retries on any. So a failure that would only repeat itself is noted in the
    store, and the attempts after it end at once with the same line.

    Args:
        reference_path: file that gets the output's reference (a KFP `OutputPath(str)`).
        manifest: KFP artifact that carries the manifest, never the output's own files.
        metrics: KFP `Metrics` artifact.
        shown: KFP artifact (`HTML`, `Markdown`) per small file of the output that KFP's page is to show.
    Returns: the step's verdict; without one whether there is an output, which is true.
    """
    _adopt_tracking_settings()
    silence_progress_bars()
    try:
        clean_credentials()
        if POD_VARIABLE in os.environ:
            check_typed({"store": store, **inputs, get_step(name).config_section: config}, name)
        result = _run_unless_failed(
            name, store=unpack(store), inputs=unpack(inputs), config=unpack(config), run_id=run_id
        )
        return _write_outputs(name, result, reference_path, manifest, metrics, shown or {})
    except Exception as error:
        sys.exit(report(name, error))


def _write_outputs(
    name: str, result: StepResult, reference_path: str, manifest: Any, metrics: Any, shown: Mapping[str, Any]
) -> bool:
    _write(Path(reference_path), str(result.reference))
    _write(Path(manifest.path), result.manifest.to_bytes().decode())
    manifest.metadata.update(uri=result.reference.uri, digest=result.reference.digest, kind=result.manifest.kind)
    if result.manifest.warnings:
        manifest.metadata["warnings"] = "\n".join(result.manifest.warnings)
    for key, value in result.manifest.metrics.items():
        metrics.log_metric(key, value)
    # KFP shows what was logged; its local cache takes an output without a file for a miss.
    _write(Path(metrics.path), json.dumps(result.manifest.metrics, indent=2))
    if shown:
        folder, _ = fetch_artifact(result.reference)
        for name_in_output, artifact in shown.items():
            _write(Path(artifact.path), (folder / name_in_output).read_text())
    step = get_step(name)
    if step.verdict is None:
        return True
    verdict = step.verdict_text(result.manifest.metrics)
    # For people, and for `finemill submit`: KFP's API tells of no output.
    print(f"{name}: {step.verdict}: {verdict}", file=sys.stderr)
    return verdict == "true"


def _run_unless_failed(
    name: str, *, store: str, inputs: Mapping[str, str], config: Mapping[str, Any], run_id: str
) -> StepResult:
    attempt = os.environ.get(ATTEMPT_VARIABLE)
    failure = TerminalFailure.of_call(name, store=store, inputs=inputs, config=config, run_id=run_id)
    if attempt == "0":
        failure.forget()
    elif attempt is not None:
        failure.raise_if_noted()
    try:
        return run_step(
            name,
            store=store,
            inputs=inputs,
            config=config,
            run_id=run_id or None,
            tracking=Tracking.of_environment(),
        )
    except Exception as error:
        if attempt is not None and not isinstance(error, TemporaryError):
            failure.note(*describe(name, error))
        raise


def _adopt_tracking_settings() -> None:
    """Take the ConfigMap's and the Secret's settings, unless KFP's plugin has named a server."""
    if not os.environ.get(TRACKING_VARIABLE):
        names = [name for name in os.environ if name.startswith(f"{TRACKING_PREFIX}MLFLOW_")]
        os.environ.update({name.removeprefix(TRACKING_PREFIX): os.environ[name] for name in names})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
