"""`finemill <step>`: run one step on references, print the reference of its output."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from finemill.artifacts.ports import BASE_MODEL
from finemill.commands.config_flags import add_config_flags, read_config
from finemill.commands.parser import CommandParser
from finemill.runtime.catalog import Step, get_step
from finemill.tracking.settings import Tracking
from finemill.transport import decode_text


def execute(name: str, arguments: list[str]) -> int:
    """Parse `arguments` for the step `name` and run it. Returns: the exit code."""
    step = get_step(name)
    parsed = _parser(step).parse_args(arguments)
    config = read_config(parsed, step.config, f"finemill {name}")
    if parsed.dry_run:
        print(config.model_dump_json(indent=2))
        return 0
    from finemill.runtime.processes import is_main_process
    from finemill.runtime.run import assist_step, run_step

    store = decode_text(parsed.store)
    inputs = {port: decode_text(getattr(parsed, port)) for port in step.inputs}
    if not is_main_process():
        assist_step(name, store=store, inputs=inputs, config=config, run_id=parsed.run_id)
        return 0
    # Libraries print what they like; standard output is for the reference alone.
    with redirect_stdout(sys.stderr):
        result = run_step(
            name,
            store=store,
            inputs=inputs,
            config=config,
            run_id=parsed.run_id,
            tracking=Tracking.of_environment(),
        )
    print(result.reference)
    _write(parsed.output_file, str(result.reference))
    if step.verdict:
        verdict = step.verdict_text(result.manifest.metrics)
        print(f"{step.verdict}: {verdict}")
        _write(parsed.verdict_file, verdict)
    return 0


def _write(file: Path | None, text: str) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _parser(step: Step) -> argparse.ArgumentParser:
    parser = CommandParser(prog=f"finemill {step.name}", description=step.summary, allow_abbrev=False)
    parser.add_argument(
        "--store", default="finemill-store", metavar="URI", help="folder or s3://bucket/prefix (default: %(default)s)"
    )
    for port in step.inputs:
        parser.add_argument(f"--{port.replace('_', '-')}", required=True, metavar="REF", help=_input_help(port))
    parser.add_argument("--run-id", help="groups the steps of one pipeline run in MLflow")
    parser.add_argument("--output-file", type=Path, metavar="FILE", help="also write the output's reference to FILE")
    if step.verdict:
        parser.add_argument("--verdict-file", type=Path, metavar="FILE", help=f"also write {step.verdict} to FILE")
    parser.add_argument("--dry-run", action="store_true", help="validate, print the resolved config, do nothing")
    add_config_flags(parser, step.config)
    return parser


def _input_help(port: str) -> str:
    if port == BASE_MODEL:
        return "builtin:tiny-qwen3, a folder, hf://org/name@revision, or the reference of a merged model"
    return f"reference of the {port}, <uri>@sha256:<digest>"
