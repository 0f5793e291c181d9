"""The `finemill` command: parses, calls, prints. Decides nothing, and imports only what the chosen command needs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

# name -> (one line of help, module under finemill.commands with `add_arguments` and `execute`)
_COMMANDS = {
    "run": ("run a pipeline on this machine", "run"),
    "submit": ("run a pipeline in a cluster, on KFP or Argo", "submit"),
    "watch": ("follow a submitted run to its end", "watch"),
    "compile": ("write a pipeline as KFP or Argo YAML", "compile"),
    "preflight": ("configuration, store, tracking server, base model, GPU memory -> plan, or why not", "step"),
    "data-prep": ("raw rows -> cleaned, deduplicated, mixed and split rows", "step"),
    "chat-format": ("rows -> token ids and labels under the model's chat template", "step"),
    "detect-change": ("dataset against that of the newest registered version -> changed or not", "step"),
    "train-qlora": ("tokens + base model -> LoRA adapter", "step"),
    "train-dpo": ("chosen and rejected tokens + base model -> LoRA adapter", "step"),
    "eval": ("base and adapter on held-out rows -> metrics and report", "step"),
    "merge": ("base + adapter -> merged 16-bit model", "step"),
    "gguf-quantize": ("merged model -> GGUF files, checked in llama.cpp", "step"),
    "register": ("results -> a version in MLflow's registry", "step"),
    "score-champion": ("champion on the rows of a new version's evaluation -> its scores there", "step"),
    "promote": ("new version against the champion -> alias moved or not", "step"),
    "rollback": ("make the previous champion champion again", "rollback"),
    "gc": ("delete artifacts that no registered version was made from", "gc"),
    "schema": ("print the JSON schema of a step's or pipeline's config", "schema"),
    "bench": ("time kernels or a whole training step on a GPU", "bench"),
    "estimate": ("predict memory and speed of a training step", "bench"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code: 0 done, 2 bad input, 3 gate failed, 75 try again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in _COMMANDS:
        _parse_top_level(arguments)
    # Batches of varying length leave gaps in segments of fixed size, and a full GPU takes seconds to give them back.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from finemill.errors import StepError

    name, rest = arguments[0], arguments[1:]
    try:
        exit_code = _command(name)(name, rest)
        sys.stdout.flush()
    except StepError as error:
        print(f"finemill {name}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"finemill {name}: interrupted; the same command goes on from the last finished step", file=sys.stderr)
        return 130
    return exit_code


def _command(name: str) -> Callable[[str, list[str]], int]:
    from importlib import import_module

    module = import_module(f"finemill.commands.{_COMMANDS[name][1]}")
    execute: Callable[[str, list[str]], int] = module.execute
    return execute


def _parse_top_level(arguments: list[str]) -> None:
    """Print help or version, or the usage error; ends the process."""
    from finemill import __version__

    width = max(map(len, _COMMANDS)) + 2
    table = "\n".join(f"  {name:<{width}}{help_text}" for name, (help_text, _) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="finemill",
        usage="finemill COMMAND [OPTIONS]",
        description="From raw chat data and a base model to a tuned, evaluated, exported and registered model.",
        epilog=f"commands:\n{table}\n\n`finemill COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"finemill {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments or ["--help"])
    parser.error(f"unknown command '{parsed.command}'; the commands are {', '.join(_COMMANDS)}")
