"""`finemill rollback`: the previous champion becomes champion again."""

import argparse

from finemill.commands.config_flags import add_config_flags, read_config
from finemill.components.promote.config import RollbackConfig
from finemill.tracking.settings import Tracking


def execute(name: str, arguments: list[str]) -> int:
    """Parse `arguments`, move the aliases, print which version is champion now. Returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"finemill {name}",
        description="Make the previous champion of a registered model champion again. MLFLOW_TRACKING_URI says where.",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print the resolved config, do nothing")
    add_config_flags(parser, RollbackConfig)
    parsed = parser.parse_args(arguments)
    config = read_config(parsed, RollbackConfig, f"finemill {name}")
    if parsed.dry_run:
        print(config.model_dump_json(indent=2))
        return 0
    from finemill.components.promote.rollback import rollback

    result = rollback(config, Tracking.of_environment().registry)
    print(f"{result.registered_model_name}: version {result.champion} is champion, {result.rolled_back} is rolled back")
    return 0
