"""`finemill submit PIPELINE --engine kfp|argo`: start or schedule a run in a cluster, and follow it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from finemill.commands.config_flags import read_config
from finemill.commands.parser import CommandParser
from finemill.commands.pipeline_argument import default_config_file, parse_with_pipeline
from finemill.commands.run_status import START_TIMEOUT_S, Engine
from finemill.errors import UserError
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.parameters import check_shared_store, with_optional_fields
from finemill.pipelines.schedule import check_schedule


def execute(name: str, arguments: list[str]) -> int:
    """Submit the chosen pipeline. Returns: 0 when it is submitted; with --wait the run's own exit code."""
    pipeline, parsed = parse_with_pipeline(_parser(), arguments)
    _check_flags(parsed)
    parameters = _parameters(parsed, pipeline)
    engine = open_engine(parsed)
    if parsed.schedule is not None:
        scheduled = engine.schedule(pipeline, parameters, parsed.schedule, parsed.timezone)
        print(f"{pipeline.name} scheduled at '{parsed.schedule}': {scheduled}")
        return 0
    run = engine.submit(pipeline, parameters)
    print(run)
    if not parsed.wait:
        print(f"follow it with:  {engine.come_back(run)}", file=sys.stderr)
        return 0
    from finemill.commands.run_table import follow

    return follow(engine, run, logs=parsed.logs, start_timeout_s=parsed.start_timeout)


def _check_flags(parsed: argparse.Namespace) -> None:
    """Raises: UserError: a cluster would take the value, and no step could work with it."""
    check_schedule(parsed.schedule, parsed.timezone)
    if parsed.store is not None:
        check_shared_store(parsed.store)
    if parsed.gpus is not None and parsed.gpus < 0:
        raise UserError(f"--gpus {parsed.gpus}: give 0 for the CPU, or a number of GPUs")


def open_engine(parsed: argparse.Namespace) -> Engine:
    """The engine that the flags name. Raises: StepError: a flag is missing, or the engine is out of reach."""
    if parsed.engine == "argo":
        from finemill.commands.engine_argo import ArgoEngine, parse_namespace

        return ArgoEngine(parse_namespace(parsed.namespace), getattr(parsed, "prefix", None) or "")
    if not parsed.host:
        raise UserError("--engine kfp needs --host, the URL of KFP's API server")
    from finemill.commands.engine_kfp import KFPEngine
    from finemill.pipelines.cluster import read_cluster_config

    cluster = read_cluster_config(getattr(parsed, "cluster", None))
    return KFPEngine(parsed.host, parsed.namespace, cluster)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where runs are."""
    parser.add_argument("--engine", choices=["kfp", "argo"], required=True, help="which system runs it")
    parser.add_argument("--host", metavar="URL", help="KFP: its API server, http://localhost:8888")
    parser.add_argument("--namespace", metavar="NAME", help="Argo: where the chart is installed; KFP: the user's own")
    parser.add_argument(
        "--start-timeout", type=_seconds, default=START_TIMEOUT_S, metavar="SECONDS", help="end a run that is "
        "followed when a step has waited so long for a place, a GPU as a rule; 0: never (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--no-logs", dest="logs", action="store_false", help="show the table only")


def _seconds(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}': give whole seconds, or 0 for no limit")
    return int(text)


def _parameters(parsed: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """What the caller gave; everything else keeps the installed pipeline's defaults. KFP gets the pipeline only now,
    and starts as `finemill run` does from the configuration that comes with it.
    """
    default = default_config_file(pipeline) if parsed.engine == "kfp" else None
    config = read_config(parsed, with_optional_fields(pipeline.config), "finemill submit", default)
    given = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
    extra = {"store": parsed.store, "gpus": None if parsed.gpus is None else str(parsed.gpus)}
    return {**given, **{key: value for key, value in extra.items() if value is not None}}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="finemill submit",
        description="Start a pipeline in a cluster. What is not given keeps the installed pipeline's defaults.",
        allow_abbrev=False,
    )
    add_engine_flags(parser)
    parser.add_argument("--store", metavar="URI", help="s3://bucket/prefix that gets every artifact")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of training and evaluation; 0: on the CPU")
    parser.add_argument("--wait", action="store_true", help="follow the run and end with its exit code")
    parser.add_argument("--schedule", metavar="CRON", help="run it on a schedule, five fields, '0 3 * * *'")
    parser.add_argument("--timezone", metavar="NAME", help="Argo: time zone of the schedule, 'Europe/Berlin'")
    parser.add_argument("--prefix", metavar="TEXT", help="Argo: the release's workflow.namePrefix, 'team-a-'")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="KFP: YAML file of `finemill schema cluster`")
    return parser
