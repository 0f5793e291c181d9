"""The PIPELINE argument of `run` and `compile`: known before the flags that mirror its configuration."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finemill.pipelines.catalog import PIPELINES, get_pipeline
from finemill.pipelines.graph import Pipeline


def choose_pipeline(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Pipeline:
    """Add the argument to `parser` and return the pipeline it names.

    Raises: UserError: there is no pipeline of that name.
    """
    parser.add_argument("pipeline", metavar="PIPELINE", help=", ".join(PIPELINES))
    named = [argument for argument in arguments[:1] if not argument.startswith("-")]
    if not named:
        parser.parse_args(list(arguments))
        parser.error(f"name the pipeline first: {', '.join(PIPELINES)}")
    return get_pipeline(named[0])


def default_config_file(pipeline: Pipeline) -> Path | None:
    """The configuration that comes with a pipeline, for a call without `--config`; None where none could run."""
    file = Path(__file__).parents[1] / "pipelines" / "configs" / f"{pipeline.name}.yaml"
    return file if file.exists() else None
