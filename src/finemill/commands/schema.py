"""`finemill schema NAME`: the JSON schema of a configuration, for editors and checks."""

import json

from finemill.commands.parser import CommandParser
from finemill.config import StepConfig
from finemill.runtime.catalog import STEPS


def execute(name: str, arguments: list[str]) -> int:
    """Print the schema of a step's or a pipeline's configuration. Returns: the exit code."""
    from finemill.pipelines.catalog import PIPELINES
    from finemill.pipelines.cluster import ClusterConfig

    models: dict[str, type[StepConfig]] = {
        **{step.name: step.config for step in STEPS.values()},
        **{pipeline.name: pipeline.config for pipeline in PIPELINES.values()},
        "cluster": ClusterConfig,
    }
    parser = CommandParser(prog="finemill schema", description="Print the JSON schema of a configuration.")
    parser.add_argument("name", choices=list(models), metavar="NAME", help=", ".join(models))
    print(json.dumps(models[parser.parse_args(arguments).name].model_json_schema(), indent=2))
    return 0
