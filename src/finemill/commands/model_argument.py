"""The arguments of commands that run a model: which one, and how it is asked."""

import argparse
from typing import Any

from finemill.asking.find_model import FORMS, FoundModel, find_model
from finemill.errors import UserError

_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 5.0), "top_p": (1e-6, 1.0), "top_k": (0, 1_000_000), "min_p": (0.0, 1.0), "seed": (0, 2**31)
}  # fmt: skip
_WHOLE = ("top_k", "seed")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and what says more about it."""
    parser.add_argument("model", metavar="MODEL", help=FORMS)
    add_opening_arguments(parser)


def add_opening_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says more about a model, or about several."""
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


def add_sampling_arguments(parser: argparse.ArgumentParser, preset: str | None) -> None:
    """Add how tokens are chosen; `preset` is the default."""
    said = f" (default: {preset})" if preset else ""
    parser.add_argument("--preset", choices=("recommended", "greedy"), default=preset, help=f"sampling{said}")
    for name in _LIMITS:
        kind = int if name in _WHOLE else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{name} over the preset's")
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="longest answer (default: 2048)")


def read_overrides(parsed: argparse.Namespace) -> dict[str, Any]:
    """The sampling values that the user set. Raises: UserError: one is out of range."""
    found = {name: value for name in _LIMITS if (value := getattr(parsed, name)) is not None}
    for name, value in found.items():
        low, high = _LIMITS[name]
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: allowed is {low:g} to {high:g}")
    if parsed.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {parsed.max_new_tokens}: allowed is 1 or more")
    return found
