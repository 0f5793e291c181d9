"""Run one step: resolve its inputs, find its output or make it, publish, record.

The output's place is the digest of everything it depends on: inputs, configuration, code and outside state. A complete
artifact there is the result, so that repeating a step, after an interruption or in another pipeline, costs nothing.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finemill.artifacts.manifest import Manifest, Producer, Reference, new_manifest
from finemill.artifacts.ports import BASE_MODEL
from finemill.config import StepConfig, parse_config
from finemill.errors import TemporaryError, UserError
from finemill.models.base.pin import pin_base_model
from finemill.models.base.resolve import base_digest, resolve_base_model
from finemill.runtime.catalog import STEPS, Step, get_step
from finemill.runtime.code_version import producer
from finemill.runtime.context import Checkpoints, Recorder, StepContext, Unheard
from finemill.runtime.failure import describe, explained
from finemill.runtime.processes import (
    Node,
    is_among_processes,
    node_of_train_job,
    num_idle_gpus,
    num_node_processes,
    run_in_processes,
    step_arguments,
)
from finemill.runtime.train_job import run_train_job
from finemill.storage.base import normalize_uri
from finemill.storage.store import (
    check_writable,
    fetch_artifact,
    publish_artifact,
    read_artifact,
    read_manifest,
    staging_folder,
)
from finemill.tracking.progress import Progress
from finemill.tracking.settings import NOWHERE, Tracking
from finemill.tracking.step import step_run
from finemill.tracking.warning_lines import WarningLines, heard_warnings


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
    tracking: Tracking = NOWHERE,
) -> StepResult:
    """Run the step `name` unless its output is in `store` already.

    Args:
        name: kebab-case name of a step in the catalogue.
        store: URI of the folder or bucket prefix that gets the output.
        inputs: an artifact reference per input of the step; a model reference for `base_model`.
        config: the step's configuration, or its values.
        run_id: groups the steps of one pipeline run: in MLflow, and about the commit that a hub's branch stands for.
        tracking: where MLflow is.
    Raises: StepError: one line for people, with the exit code.
    """
    step = get_step(name)
    progress = Progress(step.name)
    started = time.monotonic()
    progress.emit("started")
    with heard_warnings(progress) as warnings:
        try:
            with explained():
                call = _resolve(step, store, inputs, config, run_id, tracking)
                found = _find(call)
                elsewhere = _elsewhere(call) if step.multi_process and found is None else None
                result = found or (None if elsewhere else _make_recorded(call, progress, warnings))
        except Exception as error:
            # Whoever called prints the line.
            line, exit_code = describe(step.name, error)
            progress.record("failed", text=line, seconds=time.monotonic() - started, exit_code=exit_code)
            raise
        if elsewhere:
            # The main one of the processes says how it went.
            return elsewhere()
        assert result is not None
        for line in result.manifest.warnings:
            warnings.say(line)
    progress.emit(
        "reused" if result.reused else "done",
        str(result.reference),
        seconds=time.monotonic() - started,
        reference=str(result.reference),
    )
    return result


def assist_step(
    name: str,
    *,
    store: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any] | StepConfig,
    run_id: str | None = None,
) -> None:
    """Compute beside the main process of a step that several processes share: what it writes is nobody's."""
    step = get_step(name)
    if not step.multi_process:
        return
    call = _resolve(step, store, inputs, config, run_id, NOWHERE)
    if _find(call) is None:
        with TemporaryDirectory(prefix="finemill-assist-") as folder, heard_warnings(None):
            context = call.context(Unheard())
            step.function(**_local_folders(call), output_dir=Path(folder), config=call.config, context=context)


@dataclass(frozen=True)
class _Call:
    """One call of a step, checked, and what its output depends on."""

    step: Step
    store: str
    inputs: Mapping[str, str]
    config: StepConfig
    manifests: Mapping[str, Manifest]
    state: Mapping[str, str]
    made_by: Producer
    key: str
    run_id: str | None
    tracking: Tracking

    @property
    def uri(self) -> str:
        """The output's place."""
        return f"{self.store}/{self.step.name}/{self.key}"

    def context(self, recorder: Recorder) -> StepContext:
        """What the step's function gets besides folders and configuration."""
        return StepContext(
            store=self.store,
            key=self.key,
            references=self.inputs,
            manifests=self.manifests,
            checkpoints=Checkpoints(f"{self.store}/checkpoints/{self.step.name}-{self.key}", self.made_by, self.inputs),
            recorder=recorder,
            run_id=self.run_id,
            tracking=self.tracking,
            state=self.state,
        )


def _resolve(
    step: Step,
    store: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any] | StepConfig,
    run_id: str | None,
    tracking: Tracking,
) -> _Call:
    parsed = config if isinstance(config, StepConfig) else parse_config(step.config, config, step.name)
    _check_input_names(step, inputs)
    store, made_by = normalize_uri(store), producer(step)
    if BASE_MODEL in inputs:
        inputs = {**inputs, BASE_MODEL: pin_base_model(inputs[BASE_MODEL], store, run_id, made_by)}
    manifests = {port: _read_input(step, port, value) for port, value in inputs.items() if port != BASE_MODEL}
    state = dict(step.state(inputs, parsed, tracking)) if step.state else {}
    key = _output_key(made_by, parsed, _input_digests(step, inputs, manifests), state)
    return _Call(step, store, dict(inputs), parsed, manifests, state, made_by, key, run_id, tracking)


def _read_input(step: Step, port: str, value: str) -> Manifest:
    """The manifest of an input. Raises: UserError: none is there, or it is of another kind of artifact."""
    manifest = read_artifact(Reference.parse(value))
    if manifest.kind != port:
        writers = " or ".join(other.name for other in STEPS.values() if other.kind == port)
        raise UserError(
            f"{step.name}: input {port}: {value} is of the kind '{manifest.kind}', not '{port}': pass the reference "
            f"that {writers} printed"
        )
    return manifest


def _find(call: _Call) -> StepResult | None:
    """The output that stands in the store already."""
    standing = read_manifest(call.uri)
    return StepResult(Reference(call.uri, standing.digest), standing, reused=True) if standing else None


def _make_recorded(call: _Call, progress: Progress, warnings: WarningLines) -> StepResult:
    """Make the output in the store, with an MLflow run of its own."""
    check_writable(call.store)
    with step_run(
        call.step.name,
        config=call.config,
        inputs=call.inputs,
        made_by=call.made_by,
        store=call.store,
        run_id=call.run_id,
        tracking=call.tracking,
        progress=progress,
        warnings=warnings.lines,
    ) as run:
        manifest = _make(call, call.context(run), warnings)
        reference = Reference(call.uri, manifest.digest)
        run.finish(reference, manifest)
    return StepResult(reference, manifest, reused=False)


def _elsewhere(call: _Call) -> Callable[[], StepResult] | None:
    """What has other processes do it, of a TrainJob's nodes or one per GPU; None where this one is to."""
    node = node_of_train_job()
    if node:
        return partial(_run_in_processes, call, num_node_processes(), node)
    num_nodes = getattr(call.config, "num_nodes", 1)
    if num_nodes > 1 and not is_among_processes():
        return partial(_run_in_train_job, call, num_nodes)
    num_gpus = num_idle_gpus()
    return partial(_run_in_processes, call, num_gpus) if num_gpus else None


def _run_in_train_job(call: _Call, num_nodes: int) -> StepResult:
    """Let the nodes of a TrainJob do it; its name is the output's, so that whoever wants that finds the job."""
    arguments = step_arguments(
        call.step.name, store=call.store, inputs=call.inputs, config=call.config.model_dump(mode="json")
    )
    run_train_job(f"{call.step.name}-{call.key}", [*arguments, *_run_id_option(call)], num_nodes)
    return _published(call, "the TrainJob")


def _run_id_option(call: _Call) -> list[str]:
    return ["--run-id", call.run_id] if call.run_id else []


def _published(call: _Call, who: str) -> StepResult:
    """What other processes published. Raises: TemporaryError: nothing is there."""
    found = _find(call)
    if found is None:
        raise TemporaryError(f"{who} has ended without its output in {call.uri}: run again")
    return StepResult(found.reference, found.manifest, reused=False)


def _run_in_processes(call: _Call, count: int, node: Node | None = None) -> StepResult:
    """Let `finemill <step>` do it in a process per GPU; the main one of them reports and records."""
    config = call.config.model_dump(mode="json")
    with TemporaryDirectory(prefix="finemill-processes-") as folder:
        output = Path(folder, "reference")
        arguments = step_arguments(
            call.step.name, store=call.store, inputs=call.inputs, config=config, output_file=output
        )
        run_in_processes([*arguments, *_run_id_option(call)], count, node)
        if node and node.rank:
            return _published(call, "the main node")
        reference = Reference.parse(output.read_text())
    return StepResult(reference, read_artifact(reference), reused=False)


def _make(call: _Call, context: StepContext, warnings: WarningLines) -> Manifest:
    """Call the step's function in a staging folder and publish that; whatever goes wrong, nothing stays behind."""
    folders = _local_folders(call)
    staging = staging_folder(call.uri)
    started = time.monotonic()
    try:
        with explained(staging):
            metrics = call.step.function(**folders, output_dir=staging, config=call.config, context=context)
            manifest = new_manifest(
                call.step.kind,
                staging,
                call.made_by,
                parents=call.inputs,
                config=call.config.model_dump(mode="json"),
                metrics=finite_metrics(metrics),
                warnings=warnings.lines,
                seconds=time.monotonic() - started,
            )
            return publish_artifact(staging, call.uri, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Plain floats. One NaN would crash KFP, so a metric that is not finite is an error where it arises.

    Raises: UserError: names the metric.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"metric '{name}' is {value}: look for values that are no numbers in the model's weights")
    return {name: float(value) for name, value in metrics.items()}


def _local_folders(call: _Call) -> dict[str, Path]:
    inputs = call.inputs.items() if call.step.fetches_inputs else ()
    return {port: _local_folder(call.step, port, value) for port, value in inputs}


def _local_folder(step: Step, port: str, value: str) -> Path:
    if port != BASE_MODEL:
        return fetch_artifact(Reference.parse(value))[0]
    return resolve_base_model(value, step.base_part).path


def _input_digests(step: Step, inputs: Mapping[str, str], manifests: Mapping[str, Manifest]) -> dict[str, str]:
    digests = {port: manifest.digest for port, manifest in manifests.items()}
    if BASE_MODEL in inputs:
        digests[BASE_MODEL] = base_digest(inputs[BASE_MODEL], step.base_part)
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
