"""The PIPELINE argument of `run`, `submit` and `compile`: known before the flags that mirror its configuration."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finemill.commands.config_flags import add_config_flags
from finemill.errors import UserError
from finemill.pipelines.catalog import PIPELINES, get_pipeline
from finemill.pipelines.graph import Pipeline


def parse_with_pipeline(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[Pipeline, argparse.Namespace]:
    """Add the argument and its configuration's flags to `parser`, and parse.

    Returns: the pipeline that is named, and all that was given.
    Raises: UserError: there is no pipeline of that name.
    """
    parser.add_argument("pipeline", metavar="PIPELINE", help=", ".join(PIPELINES))
    pipeline = _named(parser, arguments)
    add_config_flags(parser, pipeline.config)
    parsed = parser.parse_args(arguments)
    if parsed.pipeline != pipeline.name:
        raise UserError(f"'{parsed.pipeline}' is the pipeline here: name it before the options")
    return pipeline, parsed


def _named(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Pipeline:
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    # Behind options the name may also be a value of one: the parser, which will know them, is asked afterwards.
    named = first or next((argument for argument in arguments if argument in PIPELINES), None)
    if named is None:
        parser.parse_args(list(arguments))
        parser.error(f"name the pipeline: {', '.join(PIPELINES)}")
    return get_pipeline(named)


def default_config_file(pipeline: Pipeline) -> Path | None:
    """The configuration that comes with a pipeline, for a call without `--config`; None where none could run."""
    file = Path(__file__).parents[1] / "pipelines" / "configs" / f"{pipeline.name}.yaml"
    return file if file.exists() else None
