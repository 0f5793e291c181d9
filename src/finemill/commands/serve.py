"""`finemill serve MODEL`: a model behind an OpenAI-compatible address, and the line that does it without finemill."""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import threading
from pathlib import Path
from typing import NoReturn

from finemill.artifacts.adapter import read_training
from finemill.asking.find_model import FoundModel
from finemill.commands.model_argument import add_model_arguments, found_model
from finemill.commands.parser import CommandParser
from finemill.errors import UserError
from finemill.models.adapter import more_than_lora, read_adapter_config


def execute(name: str, arguments: list[str]) -> int:
    """Print the line, and serve until Ctrl-C unless only the line is wanted. Returns: the exit code."""
    parsed = _parser(name).parse_args(arguments)
    found = found_model(parsed)
    if found.url:
        raise UserError(f"{found.url} is served already: finemill chat asks it")
    if found.gguf:
        length = parsed.context_length or 8192
        print(shlex.join(_llama_server(found.gguf, length, parsed)), flush=True)
        if not parsed.dry_run:
            _serve_gguf(found.gguf, length, parsed)
        return 0
    command = _vllm(found, parsed)
    print(shlex.join(command), flush=True)
    if not parsed.dry_run:
        _serve_with_vllm(command)
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Serve a model to OpenAI's clients: GGUF in llama.cpp's server, which comes with the extra `gguf`; "
        "weights and adapters in vLLM where it is installed. The first line printed starts the same without finemill.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port (default: 8080; 0 takes a free one)")
    parser.add_argument("--dry-run", action="store_true", help="print the line only")
    return parser


def _served_name(found: FoundModel, parsed: argparse.Namespace) -> str:
    return str(parsed.model_name or found.name.removeprefix("models:/"))


def _llama_server(path: Path, length: int, parsed: argparse.Namespace) -> list[str]:
    """`--jinja` takes the file's own chat template."""
    name = parsed.model_name or path.stem
    command = ["llama-server", "--model", str(path), "--alias", name, "--jinja", "--ctx-size", str(length)]
    return [*command, "--host", parsed.host, "--port", str(parsed.port)]


def _vllm(found: FoundModel, parsed: argparse.Namespace) -> list[str]:
    command = ["vllm", "serve", str(found.folder), "--host", parsed.host, "--port", str(parsed.port)]
    name = _served_name(found, parsed)
    if found.adapter is None:
        command += ["--served-model-name", name]
    else:
        config = read_adapter_config(found.adapter)
        if setting := more_than_lora(config):
            raise UserError(
                f"the adapter has {setting}, and vLLM adds LoRA on linear layers only: merge it, and serve the model"
            )
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        command += ["--enable-lora", "--max-lora-rank", str(_allowed_rank(rank))]
        command += ["--lora-modules", f"{name}={found.adapter}", "--tokenizer", str(found.adapter)]
        training = read_training(found.adapter)
        if training and training.rope_parameters:
            command += ["--hf-overrides", json.dumps({"rope_parameters": training.rope_parameters})]
    return command + (["--max-model-len", str(parsed.context_length)] if parsed.context_length else [])


def _allowed_rank(rank: int) -> int:
    """vLLM takes these only. Raises: UserError: the adapter has more."""
    allowed = (8, 16, 32, 64, 128, 256, 320, 512)
    found = next((value for value in allowed if value >= rank), None)
    if found is None:
        raise UserError(f"the adapter has rank {rank}, vLLM serves up to {allowed[-1]}: serve the merged model")
    return found


def _serve_with_vllm(command: list[str]) -> NoReturn:
    """Become vLLM. Raises: UserError: it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here: run the line above where it is, or serve a GGUF file")
    os.execvp(command[0], command)


def _serve_gguf(path: Path, length: int, parsed: argparse.Namespace) -> None:
    from finemill.models.cores import available_cores
    from finemill.models.llama_cpp import serve_chats

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    name = parsed.model_name or path.stem
    with serve_chats(path, available_cores(), length, host=parsed.host, port=parsed.port, name=name) as address:
        print(f"{address}/v1 serves {name}; Ctrl-C ends it", flush=True)
        ended.wait()
