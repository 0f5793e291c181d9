"""`finemill watch RUN --engine kfp|argo`: follow a submitted run to its end."""

from finemill.commands.parser import CommandParser
from finemill.commands.run_table import follow
from finemill.commands.submit import add_engine_flags, open_engine


def execute(name: str, arguments: list[str]) -> int:
    """Follow a run. Returns: its exit code."""
    parser = CommandParser(prog="finemill watch", description="Follow a submitted run.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="what `finemill submit` printed")
    add_engine_flags(parser)
    parsed = parser.parse_args(arguments)
    return follow(open_engine(parsed), parsed.run, logs=parsed.logs, start_timeout_s=parsed.start_timeout)
