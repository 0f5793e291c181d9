"""The `finemill` command: parses, calls, prints. Decides nothing, and imports only what the chosen command needs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from finemill.commands.parser import CommandParser
from finemill.credentials import clean_credentials
from finemill.runtime.catalog import STEPS
from finemill.tracking.progress import silence_progress_bars

# Per group: name -> (one line of help, module under finemill.commands with `execute`).
_GROUPS = {
    "pipelines": {
        "run": ("Run a pipeline on this machine.", "run"),
        "submit": ("Run a pipeline in a cluster, on KFP or Argo.", "submit"),
        "watch": ("Follow a submitted run to its end.", "watch"),
        "compile": ("Write a pipeline as KFP or Argo YAML.", "compile"),
    },
    "steps": {step.name: (step.summary, "step") for step in STEPS.values()},
    "registry and store": {
        "approve": ("Approve a version, where a promotion asks for it.", "rollback"),
        "rollback": ("Make the previous champion champion again.", "rollback"),
        "replay": ("Check a decision's gates again and compare the verdicts.", "replay"),
        "gc": ("Delete artifacts that no registered version was made from.", "gc"),
    },
    "ask models": {
        "chat": ("Ask a model, in a conversation or one question from a pipe.", "chat"),
        "compare": ("Ask several models the same questions, side by side.", "compare"),
        "vote": ("Vote on pairs of answers, blind, on a page of this machine.", "vote"),
        "serve": ("Serve a model to OpenAI's clients.", "serve"),
        "gguf-lora": ("Write an adapter as GGUF, for llama.cpp beside its base.", "gguf_lora"),
        "quantize-4bit": ("Write a base in 4 bits, 16 where they count most.", "quantize_4bit"),
    },
    "schemas and measurements": {
        "score": ("Score predictions that exist already, without a model.", "score"),
        "samples": ("Print an evaluation's rows, for finemill score, EvalScope or Weave.", "samples"),
        "schema": ("Print the JSON schema of a step's or pipeline's configuration.", "schema"),
        "estimate": ("Predict memory and speed of a training step.", "estimate"),
        "bench": ("Time kernels or a whole training step on a GPU.", "bench"),
    },
}
_MODULES = {name: module for commands in _GROUPS.values() for name, (_, module) in commands.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code: 0 done, 2 bad input, 3 gate failed, 75 try again; 1 a fault of ours."""
    _prepare_streams()
    try:
        return _finish_streams(_run(argv))
    except SystemExit as end:
        # Of argparse, which has printed help or what is wrong.
        raise SystemExit(_finish_streams(end.code if isinstance(end.code, int) else 2)) from None


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in _MODULES:
        _parse_top_level(arguments)
    # Batches of varying length leave gaps in segments of fixed size, and a full GPU takes seconds to give them back.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Threads that wait would spin: where other processes keep the cores busy, a step takes five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What is run here is nobody else's business; who wants to tell the hub sets it to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    silence_progress_bars()
    name, rest = arguments[0], arguments[1:]
    try:
        clean_credentials()
        if argv is None and name in STEPS:
            _take_temporary_folder()
        return _command(name)(name, rest)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        return 141
    except KeyboardInterrupt:
        resumes = "; the same command goes on from the last finished step" if name == "run" else ""
        print(f"finemill {name}: interrupted{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        from finemill.runtime.failure import report

        return report(name, error)


def _prepare_streams() -> None:
    """Write UTF-8 whatever the locale, and to /dev/null what the caller closed (`>&-`): Python has None there, on which
    every print fails.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream.encoding and stream.encoding.lower() != "utf-8":
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if name == "stdout" else "backslashreplace")


def _finish_streams(exit_code: int) -> int:
    """Write out what is left. Python would do so at its end, and end with 120 where that fails, whatever the command's
    own exit code is.

    Returns: the exit code, of a command that is done another one if its output cannot be written.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if name == "stdout" and exit_code == 0:
                exit_code = 141 if isinstance(error, BrokenPipeError) else 2
                if exit_code == 2:
                    print(f"finemill: standard output cannot be written ({error.strerror})", file=sys.stderr)
    return exit_code


def _take_temporary_folder() -> None:
    """Give this process of a step a temporary folder of its own; several that compute together share one."""
    from finemill.runtime.processes import num_processes
    from finemill.storage.staging import use_own_temporary_folder

    if num_processes() == 1:
        use_own_temporary_folder()


def _command(name: str) -> Callable[[str, list[str]], int]:
    from importlib import import_module

    module = import_module(f"finemill.commands.{_MODULES[name]}")
    execute: Callable[[str, list[str]], int] = module.execute
    return execute


def _parse_top_level(arguments: list[str]) -> None:
    """Print help or version, or the usage error; ends the process."""
    from finemill import __version__

    width = max(map(len, _MODULES)) + 2
    tables = [
        "\n".join([f"{group}:", *(f"  {name:<{width}}{text}" for name, (text, _) in commands.items())])
        for group, commands in _GROUPS.items()
    ]
    parser = CommandParser(
        prog="finemill",
        usage="finemill COMMAND [OPTIONS]",
        description="From raw chat data and a base model to a tuned, evaluated, exported and registered model.",
        epilog="\n\n".join([*tables, "`finemill COMMAND --help` shows a command's options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"finemill {__version__}")
    named = next((argument for argument in arguments[1:] if argument in _MODULES), None)
    if arguments and arguments[0] not in ("-h", "--help", "--version") and arguments[0].startswith("-") and named:
        parser.error(f"the command comes before its options: finemill {named} {arguments[0]} ...")
    # A word that is no command is an error whatever follows it, `--help` too.
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments or ["--help"])
    parser.error(f"unknown command '{arguments[0]}'; the commands are {', '.join(_MODULES)}")
