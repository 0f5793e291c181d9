"""`finemill rollback` and `finemill approve`: what people do to a registered model by hand, signed."""

from finemill.commands.config_flags import add_config_flags, read_config
from finemill.commands.parser import CommandParser
from finemill.components.promote.config import ApproveConfig, RollbackConfig
from finemill.tracking.settings import Tracking

_DESCRIPTIONS = {
    "rollback": "Make the previous champion of a registered model champion again.",
    "approve": "Approve a registered version, for a promotion whose require_approval is set; then promote again.",
}


def execute(name: str, arguments: list[str]) -> int:
    """Parse `arguments`, change the registry, print what changed. Returns: the exit code."""
    parser = CommandParser(
        prog=f"finemill {name}",
        description=f"{_DESCRIPTIONS[name]} MLFLOW_TRACKING_URI says where.",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print the resolved config, do nothing")
    model: type[ApproveConfig | RollbackConfig] = ApproveConfig if name == "approve" else RollbackConfig
    if name == "approve":
        parser.add_argument("config:version", metavar="VERSION", help="number of the version")
    add_config_flags(parser, model)
    parsed = parser.parse_args(arguments)
    config = read_config(parsed, model, f"finemill {name}")
    if parsed.dry_run:
        print(config.model_dump_json(indent=2))
        return 0
    print(_approve(config) if isinstance(config, ApproveConfig) else _rollback(config))
    return 0


def _rollback(config: RollbackConfig) -> str:
    from finemill.components.promote.rollback import rollback

    result = rollback(config, Tracking.of_environment().registry)
    other = "the one after it was deleted" if result.rolled_back is None else f"{result.rolled_back} is rolled back"
    return f"{result.registered_model_name}: version {result.champion} is champion, {other}"


def _approve(config: ApproveConfig) -> str:
    from finemill.components.promote.approve import approve

    by = approve(config, Tracking.of_environment().registry)
    return f"{config.registered_model_name}: version {config.version} is approved by {by}"
