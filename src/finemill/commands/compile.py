"""`finemill compile PIPELINE --engine kfp|argo -o FILE`."""

import argparse
from pathlib import Path

from finemill.commands.config_flags import add_config_flags, read_config
from finemill.commands.pipeline_argument import choose_pipeline, default_config_file
from finemill.components.images import IMAGES


def execute(name: str, arguments: list[str]) -> int:
    """Write the chosen pipeline for the chosen engine. Returns: the exit code."""
    parser = _parser()
    pipeline = choose_pipeline(parser, arguments)
    add_config_flags(parser, pipeline.config)
    parsed = parser.parse_args(arguments)
    parsed.config = parsed.config or default_config_file(pipeline)
    config = read_config(parsed, pipeline.config, "finemill compile")
    defaults = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if parsed.store:
        defaults["store"] = parsed.store
    images = {"cpu": parsed.image_cpu, "train": parsed.image_train}
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    if parsed.engine == "kfp":
        from finemill.pipelines.render_kfp import compile_kfp

        compile_kfp(pipeline, defaults, images, parsed.output)
    else:
        from finemill.pipelines.render_argo import compile_argo

        compile_argo(pipeline, defaults, images, parsed.output)
    print(parsed.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finemill compile", description="Write a pipeline as KFP or Argo YAML.", allow_abbrev=False
    )
    parser.add_argument("--engine", choices=["kfp", "argo"], required=True, help="which system will run it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="YAML file to write")
    parser.add_argument("--store", metavar="URI", help="default of the run's store parameter, s3://bucket/prefix")
    parser.add_argument("--image-cpu", default=IMAGES["cpu"], metavar="IMAGE", help="default: %(default)s")
    parser.add_argument("--image-train", default=IMAGES["train"], metavar="IMAGE", help="default: %(default)s")
    return parser
