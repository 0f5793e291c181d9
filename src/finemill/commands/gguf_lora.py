"""`finemill gguf-lora ADAPTER -o FILE`: an adapter for llama.cpp, beside any GGUF file of its base."""

import argparse
from pathlib import Path

from finemill.commands.model_argument import add_model_arguments, found_model
from finemill.commands.parser import CommandParser
from finemill.components.gguf_quantize.lora import write_lora
from finemill.errors import UserError


def execute(name: str, arguments: list[str]) -> int:
    """Write the file, and print the line that runs it. Returns: the exit code."""
    parsed = _parser(name).parse_args(arguments)
    found = found_model(parsed)
    if found.adapter is None or found.folder is None:
        raise UserError(f"{parsed.model} is no adapter: pass what train-qlora or train-dpo printed")
    output: Path = parsed.output
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no folder: make it, or write elsewhere")
    count = write_lora(found.folder, found.adapter, output)
    print(f"{output}: {count} tensors, {output.stat().st_size / 1e6:.1f} MB")
    print(f"llama-server -m BASE.gguf --lora {output} --jinja")
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Write a LoRA adapter as GGUF, of a mixture of experts too: llama.cpp adds it to any GGUF file of "
        "the base, so that many adapters share one base. Whole trained modules and DoRA need `merge`.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    return parser
