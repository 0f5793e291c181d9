"""`finemill run PIPELINE`: a whole pipeline on this machine."""

import argparse
import os
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from finemill.commands.config_flags import read_config
from finemill.commands.parser import CommandParser
from finemill.commands.pipeline_argument import default_config_file, parse_with_pipeline
from finemill.commands.run_display import RunDisplay, print_results
from finemill.config import ConfigT, StepConfig
from finemill.models.base.resolve import resolve_base_model
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.local import for_this_machine, run_locally
from finemill.pipelines.parameters import ARGUMENT_CHARACTERS, for_kfp, run_parameters
from finemill.storage.base import local_path, normalize_uri
from finemill.storage.store import check_writable
from finemill.tracking.settings import TRACKING_VARIABLE, Tracking


def execute(name: str, arguments: list[str]) -> int:
    """Run the chosen pipeline and print its results. Returns: the exit code."""
    pipeline, parsed = parse_with_pipeline(_parser(), arguments)
    config = read_config(parsed, pipeline.config, "finemill run", default_config_file(pipeline))
    if parsed.dry_run:
        print(config.model_dump_json(indent=2, by_alias=True))
        return 0
    return _run(pipeline, config, normalize_uri(parsed.store))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="finemill run", description="Run a pipeline on this machine under kfp's local runner.", allow_abbrev=False
    )
    parser.add_argument(
        "--store", default="finemill-store", metavar="URI", help="folder or s3://bucket/prefix (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print the resolved config, do nothing")
    return parser


def _run(pipeline: Pipeline, config: StepConfig, store: str) -> int:
    check_writable(store)
    config = with_pinned_base(config)
    from finemill.registry.snapshot import check_registry_reads
    from finemill.tracking.pipeline import parent_run

    tracking = Tracking.of_environment(default_uri=local_tracking_uri(store))
    if any(task.name == "register" for task in pipeline.tasks):
        check_registry_reads(tracking.registry, store)
    log_file = _log_file(store, pipeline.name)
    print(f"finemill run {pipeline.name}: store {store}, log {log_file}", file=sys.stderr)
    display = RunDisplay([task.name for task in for_this_machine(pipeline).tasks], sys.stderr)
    # A supervisor's SIGTERM ends the steps too, as Ctrl-C does: each saves what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with parent_run(pipeline.name, config, tracking) as run:
        environment = {TRACKING_VARIABLE: tracking.runs, **run.environment}

        def on_event(event: dict[str, Any]) -> None:
            run.record(event)
            display.show(event)

        finished = run_locally(pipeline, _parameters(pipeline, config, store), log_file, on_event, environment)
    print_results(finished.references, tracking.runs, sys.stdout)
    return 0


def with_pinned_base(config: ConfigT) -> ConfigT:
    """The configuration with the commit that the name of a hub's model stands for now: every step gets the same.

    Raises: as `resolve_base_model`: the model is fetched here, before anything is computed.
    """
    base_model: str | None = getattr(config, "base_model", None)
    return config.model_copy(update={"base_model": resolve_base_model(base_model).id}) if base_model else config


def _parameters(pipeline: Pipeline, config: StepConfig, store: str) -> dict[str, Any]:
    values = for_kfp({"store": store, **run_parameters(config)}, ARGUMENT_CHARACTERS)
    return {item.name: values[item.name] for item in for_this_machine(pipeline).parameters if item.name in values}


def local_tracking_uri(store: str) -> str:
    """SQLite beside a folder store; with a bucket, in the working folder."""
    folder = local_path(store) if store.startswith("file:") else Path.cwd()
    # SQLAlchemy decodes percent signs, and a question mark would end the path.
    return f"sqlite:///{str(folder / 'mlflow.db').replace('%', '%25').replace('?', '%3F')}"


def _log_file(store: str, name: str) -> Path:
    folder = local_path(store) if store.startswith("file:") else Path.cwd() / "finemill-logs"
    return folder / "logs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
