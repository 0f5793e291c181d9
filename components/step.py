"""Run one step: resolve its inputs, find its output or make it, publish, record.

The output's place is the digest of everything it depends on: inputs, configuration, code and outside state. A complete
artifact there is the result, so that repeating a step, after an interruption or in another pipeline, costs nothing.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemill.components.artifacts import Manifest, Producer, Reference
from finemill.components.code_version import producer
from finemill.components.config import StepConfig, parse_config
from finemill.components.context import Checkpoints, StepContext, new_manifest
from finemill.components.errors import StepError, UserError
from finemill.components.progress import Progress
from finemill.components.steps import BASE_MODEL, Step, get_step
from finemill.components.storage.store import fetch_artifact, normalize_uri, open_store, read_artifact
from finemill.components.tracking.step import step_run


@dataclass(frozen=True)
class StepResult:
    """The output's reference and manifest, and whether it was there already."""

    reference: Reference
    manifest: Manifest
    reused: bool


def run_step(
    name: str,
    *,
    store: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any] | StepConfig,
    run_id: str | None = None,
) -> StepResult:
    """Run the step `name` unless its output is in `store` already.

    Args:
        name: kebab-case name of a step in `steps.py`.
        store: URI of the folder or bucket prefix that gets the output.
        inputs: an artifact reference per input of the step; a model reference for `base_model`.
        config: the step's configuration, or its values.
        run_id: groups the steps of one pipeline run in MLflow.
    Raises: StepError: one line for people, with the exit code.
    """
    step = get_step(name)
    progress = Progress(step.name)
    started = time.monotonic()
    progress.emit("started")
    try:
        result = _find_or_make(step, normalize_uri(store), dict(inputs), config, run_id, progress)
    except Exception as error:
        exit_code = error.exit_code if isinstance(error, StepError) else 1
        line = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
        progress.emit("failed", line, seconds=time.monotonic() - started, exit_code=exit_code)
        raise
    progress.emit(
        "reused" if result.reused else "done",
        str(result.reference),
        seconds=time.monotonic() - started,
        reference=str(result.reference),
    )
    return result


def _find_or_make(
    step: Step, store_uri: str, inputs: dict[str, str], config: Any, run_id: str | None, progress: Progress
) -> StepResult:
    parsed = config if isinstance(config, StepConfig) else parse_config(step.config, config, step.name)
    _check_input_names(step, inputs)
    manifests = {port: read_artifact(Reference.parse(value)) for port, value in inputs.items() if port != BASE_MODEL}
    state = dict(step.state(inputs, parsed)) if step.state else {}
    made_by = producer(step)
    key = _output_key(made_by, parsed, _input_digests(inputs, manifests), state)
    uri = f"{store_uri}/{step.name}/{key}"
    store = open_store(store_uri)
    standing = store.read_manifest(uri)
    if standing is not None:
        return StepResult(Reference(uri, standing.digest), standing, reused=True)
    store.check_writable()
    with step_run(
        step.name, config=parsed, inputs=inputs, made_by=made_by, store=store_uri, run_id=run_id, progress=progress
    ) as run:
        context = StepContext(
            store=store_uri,
            key=key,
            references=inputs,
            manifests=manifests,
            checkpoints=Checkpoints(f"{store_uri}/checkpoints/{step.name}-{key}", made_by),
            recorder=run,
            run_id=run_id,
            state=state,
        )
        manifest = _make(step, uri, parsed, context, made_by)
        reference = Reference(uri, manifest.digest)
        run.finish(reference, manifest)
    return StepResult(reference, manifest, reused=False)


def _make(step: Step, uri: str, config: StepConfig, context: StepContext, made_by: Producer) -> Manifest:
    """Call the step's function in a staging folder and publish that; whatever goes wrong, nothing stays behind."""
    store = open_store(uri)
    inputs = context.references.items() if step.fetches_inputs else ()
    folders = {port: _local_folder(port, value) for port, value in inputs}
    staging = store.staging_folder(uri)
    started = time.monotonic()
    try:
        metrics = step.function(**folders, output_dir=staging, config=config, context=context)
        manifest = new_manifest(
            step.output,
            staging,
            made_by,
            parents=context.references,
            config=config.model_dump(mode="json"),
            metrics=finite_metrics(metrics),
            seconds=time.monotonic() - started,
        )
        return store.publish(staging, uri, manifest)
    except OSError as error:
        raise StepError(f"{step.name}: {error.strerror or error} ({error.filename or staging})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Plain floats. One NaN would crash KFP, so a metric that is not finite is an error where it arises.

    Raises: ValueError: names the metric.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"metric '{name}' is {value}: a step reports finite numbers only")
    return {name: float(value) for name, value in metrics.items()}


def _local_folder(port: str, value: str) -> Path:
    if port != BASE_MODEL:
        return fetch_artifact(Reference.parse(value))[0]
    from finemill.components.base_model.resolve import resolve_base_model

    return resolve_base_model(value).path


def _input_digests(inputs: Mapping[str, str], manifests: Mapping[str, Manifest]) -> dict[str, str]:
    digests = {port: manifest.digest for port, manifest in manifests.items()}
    if BASE_MODEL in inputs:
        from finemill.components.base_model.resolve import resolve_base_model

        digests[BASE_MODEL] = resolve_base_model(inputs[BASE_MODEL]).digest
    return digests


def _check_input_names(step: Step, inputs: Mapping[str, str]) -> None:
    missing = [port for port in step.inputs if not inputs.get(port)]
    unknown = sorted(set(inputs) - set(step.inputs))
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise UserError(f"{step.name}: input {problem}; it takes {', '.join(step.inputs) or 'no inputs'}")


def _output_key(made_by: Producer, config: StepConfig, digests: Mapping[str, str], state: Mapping[str, str]) -> str:
    material = {
        "step": made_by.step,
        "code": made_by.code,
        "config": config.model_dump(mode="json", exclude=set(config.not_in_key)),
        "inputs": dict(digests),
        "state": dict(state),
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:20]
