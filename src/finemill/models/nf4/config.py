"""What config.json says of weights that are in 4 bits on the disk."""

import json
from pathlib import Path
from typing import Any

import torch


def is_quantized(folder: Path) -> bool:
    """Whether the weights in `folder` are in 4 bits of bitsandbytes'."""
    path = folder / "config.json"
    if not path.is_file():
        return False  # whoever loads the model says what is missing
    config = json.loads(path.read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and bool(quantization.get("load_in_4bit"))


def compute_in(config: Any, dtype: torch.dtype) -> None:
    """Have the quantized layers of a checkpoint multiply in `dtype`, whatever machine it was made for.

    Args:
        config: transformers' configuration of the folder.
    """
    config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
