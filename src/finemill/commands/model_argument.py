"""The argument MODEL of commands that run one."""

import argparse

from finemill.registry.find_model import FORMS, FoundModel, find_model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and what says more about it."""
    parser.add_argument("model", metavar="MODEL", help=FORMS)
    parser.add_argument("--base-model", metavar="REFERENCE", help="base of an adapter that does not name a known one")
    parser.add_argument(
        "--prefer",
        choices=("model", "adapter", "gguf"),
        help="which artifact of a registered version (default: the first it has, in this order)",
    )
    parser.add_argument("--model-name", metavar="NAME", help="the server's name for the model (default: its first)")
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens of a chat, for GGUF (default: 8192)")


def found_model(parsed: argparse.Namespace) -> FoundModel:
    """The model that the arguments name. Raises: UserError: there is none."""
    return find_model(parsed.model, base_model=parsed.base_model, prefer=parsed.prefer)
