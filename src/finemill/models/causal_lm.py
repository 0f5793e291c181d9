"""Loading a causal language model to measure it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finemill.models.base.unusable import explained_files
from finemill.models.nf4.config import compute_in, is_quantized

SMALL_MODEL = 50_000_000
"""Parameters below which several threads cost more than they bring."""


def load_causal_lm(
    folder: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    load_in_4bit: bool = False,
) -> Any:
    """The model in `folder`, in evaluation mode.

    Args:
        device: default: the GPU if there is one.
        dtype: of weights and arithmetic. Default: bfloat16 on a GPU, float16 on one that has no bfloat16; float32 on a
            CPU, where it is exact, nowhere emulated, and for small models as fast.
        load_in_4bit: quantize the linear layers but the output layer to NF4, as training does; arithmetic in `dtype`.
            What is in 4 bits on the disk is so whatever this says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or _suitable_dtype(device)
    quantization: dict[str, Any] = {}
    if is_quantized(folder):
        quantization["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        compute_in(quantization["config"], dtype)
    elif load_in_4bit:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with no_progress_bar(), explained_files(f"the model in {folder}"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, trust_remote_code=False, **quantization
        )
    return model.eval()


def _suitable_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextmanager
def suitable_threads(model: Any) -> Iterator[None]:
    """One thread inside the block for a small model on a CPU.

    Its matrices are so small that PyTorch's threads spin at barriers longer than they compute; on cores that others use
    as well, two threads are many times as slow as one.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    before = torch.get_num_threads()
    if small and model.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers' bar for loaded weights out of the steps' progress lines."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
