"""`finemill compile PIPELINE --engine kfp|argo -o FILE`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from finemill.commands.config_flags import read_config
from finemill.commands.parser import CommandParser
from finemill.commands.pipeline_argument import default_config_file, parse_with_pipeline
from finemill.errors import UserError
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.parameters import check_shared_store, run_parameters, with_optional_fields
from finemill.pipelines.schedule import check_schedule
from finemill.runtime.images import IMAGES

if TYPE_CHECKING:
    from finemill.pipelines.cluster import ClusterConfig


def execute(name: str, arguments: list[str]) -> int:
    """Write the chosen pipeline for the chosen engine. Returns: the exit code."""
    pipeline, parsed = parse_with_pipeline(_parser(), arguments)
    _check_engine_flags(parsed)
    from finemill.pipelines.cluster import read_cluster_config

    cluster = read_cluster_config(parsed.cluster, image_cpu=parsed.image_cpu, image_train=parsed.image_train)
    defaults = read_defaults(parsed, pipeline)
    tell_preflight(pipeline, defaults, cluster)
    text = _compiled(parsed, pipeline, defaults, cluster)
    if str(parsed.output) == "-":
        print(text, end="")
        return 0
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    parsed.output.write_text(text, encoding="utf-8")
    print(parsed.output)
    return 0


def _compiled(
    parsed: argparse.Namespace, pipeline: Pipeline, defaults: dict[str, Any], cluster: "ClusterConfig"
) -> str:
    """The YAML. kfp writes into files that are called so alone."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "pipeline.yaml")
        if parsed.engine == "kfp":
            from finemill.pipelines.render_kfp import compile_kfp

            compile_kfp(pipeline, defaults, cluster, file, manifests=parsed.manifests)
        else:
            from finemill.pipelines.render_argo import compile_argo

            compile_argo(pipeline, defaults, cluster, file, schedule=parsed.schedule, timezone=parsed.timezone)
        return file.read_text(encoding="utf-8")


def tell_preflight(pipeline: Pipeline, defaults: dict[str, Any], cluster: "ClusterConfig") -> None:
    """Let preflight know how much memory the container of a training has, unless the configuration says it."""
    tasks = {task.name: task for task in pipeline.tasks}
    training = next((task for name, task in tasks.items() if name.startswith("train-")), None)
    if training and "preflight" in tasks:
        host = {"host_memory_gib": cluster.host_memory_gib(training.resources)}
        defaults["preflight"] = host | defaults.get("preflight", {})


def read_defaults(parsed: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Values for the pipeline's parameters from the configuration and `--store`; the rest is asked for by the run."""
    model = with_optional_fields(pipeline.config)
    config = read_config(parsed, model, "finemill compile", default_config_file(pipeline))
    defaults = run_parameters(config)
    if parsed.store:
        defaults["store"] = parsed.store
    return defaults


def _check_engine_flags(parsed: argparse.Namespace) -> None:
    if parsed.engine == "kfp" and (parsed.schedule is not None or parsed.timezone is not None):
        raise UserError("KFP keeps schedules beside the pipeline: `finemill submit --engine kfp --schedule` makes one")
    if parsed.engine == "argo" and parsed.manifests:
        raise UserError("--manifests is for KFP: what is written for Argo are Kubernetes manifests always")
    check_schedule(parsed.schedule, parsed.timezone)
    if parsed.store is not None:
        check_shared_store(parsed.store)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="finemill compile", description="Write a pipeline as KFP or Argo YAML.", allow_abbrev=False
    )
    parser.add_argument("--engine", choices=["kfp", "argo"], required=True, help="which system will run it")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="YAML file to write; - for standard output"
    )
    parser.add_argument("--store", metavar="URI", help="default of the run's store parameter, s3://bucket/prefix")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="YAML file of `finemill schema cluster`")
    parser.add_argument("--image-cpu", metavar="IMAGE", help=f"default: {IMAGES['cpu']}")
    parser.add_argument("--image-train", metavar="IMAGE", help=f"default: {IMAGES['train']}")
    parser.add_argument("--manifests", action="store_true", help="KFP: Kubernetes objects instead of the bare pipeline")
    parser.add_argument("--schedule", metavar="CRON", help="Argo: add a CronWorkflow, five fields, '0 3 * * *'")
    parser.add_argument("--timezone", metavar="NAME", help="Argo: time zone of the schedule, 'Europe/Berlin'")
    return parser
