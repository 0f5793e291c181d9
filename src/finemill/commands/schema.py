"""`finemill schema NAME`: the JSON schema of a configuration, for editors and checks."""

import argparse
import json

from finemill.components.config import StepConfig
from finemill.components.steps import STEPS


def execute(name: str, arguments: list[str]) -> int:
    """Print the schema of a step's or a pipeline's configuration. Returns: the exit code."""
    from finemill.pipelines.catalog import PIPELINES

    parser = argparse.ArgumentParser(prog="finemill schema", description="Print the JSON schema of a configuration.")
    parser.add_argument("name", choices=[*STEPS, *PIPELINES], metavar="NAME", help=f"{', '.join([*STEPS, *PIPELINES])}")
    chosen = parser.parse_args(arguments).name
    model: type[StepConfig] = STEPS[chosen].config if chosen in STEPS else PIPELINES[chosen].config
    print(json.dumps(model.model_json_schema(), indent=2))
    return 0
