"""A LoRA adapter on its base: read without running code, put on the model it was trained on, every tensor in place."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from finemill.config import parse_config
from finemill.errors import UserError
from finemill.models.weights import read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Their factors are differences from a base that PEFT changes first: added to the base itself they are noise.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdapterConfig(BaseModel):
    """The fields of PEFT's `adapter_config.json` that are checked here; PEFT reads the others."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: int = Field(default=8, gt=0)
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    revision: str | None = None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises: UserError: no adapter, not JSON, not LoRA, or LoRA whose weights do not belong on the base itself."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{CONFIG_NAME} not found in {folder}: pass the adapter that train-qlora or train-dpo printed")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): train the adapter again or copy it again") from None
    config = parse_config(AdapterConfig, values, str(path))
    if config.peft_type != "LORA":
        raise UserError(f"{path}: peft_type '{config.peft_type}' is not supported; supported is LORA")
    init = str(config.init_lora_weights).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise UserError(
            f"{path}: init_lora_weights '{config.init_lora_weights}' changes the base before training, and the base "
            "itself is given here: convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def check_adapter_weights(folder: Path) -> None:
    """Raises: UserError: no safetensors file, a damaged one, or weights that are no finite floating-point numbers."""
    from safetensors import safe_open

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()]
        found = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "none"
        raise UserError(f"{folder} needs {WEIGHTS_NAME}, found {found}: save the adapter as safetensors")
    header = read_header(path)
    if not header:
        raise UserError(f"{path} holds no tensor: the adapter was saved without its weights")
    for name, tensor in header.items():
        if tensor.dtype not in _FLOATS or 0 in tensor.shape:
            raise UserError(
                f"{path}: tensor {name} has type {tensor.dtype} and shape {list(tensor.shape)}; an adapter's weights "
                f"are {', '.join(_FLOATS)} and not empty"
            )
    with safe_open(path, framework="pt") as file:
        for name in header:
            if not torch.isfinite(file.get_tensor(name)).all():
                raise UserError(f"{path}: tensor {name} holds NaN or infinity: the training that wrote it diverged")


def load_adapter(base: Any, folder: Path) -> Any:
    """`base` with the LoRA adapter in `folder`, as one PEFT model in evaluation mode.

    Raises: UserError: the adapter is missing, damaged or a pickle, or one of its tensors has no place in the base.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    read_adapter_config(folder)
    check_adapter_weights(folder)
    try:
        with warnings.catch_warnings():
            # PEFT warns of what is refused below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            tuned = PeftModelForCausalLM(base, config)
            result = tuned.load_adapter(folder, "default")
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"the adapter in {folder} does not fit the base model: {line:.300}") from error
    _check_keys(folder, tuned, result.missing_keys, result.unexpected_keys)
    return tuned.eval()


def _check_keys(folder: Path, tuned: Any, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises: UserError: a tensor of the adapter went nowhere, or a place for one stayed empty."""
    if not missing and not unexpected:
        return
    total = len(read_header(folder / WEIGHTS_NAME))
    examples = [
        f"{keys[0].replace('.default', '')} is {problem}"
        for keys, problem in ((unexpected, "not in the base"), (missing, "not in the adapter"))
        if keys
    ]
    raise UserError(
        f"{total - len(unexpected)} of {total} tensors of the adapter in {folder} fit the base model "
        f"({type(tuned.get_base_model()).__name__}): {'; '.join(examples)}; was it trained on another architecture?"
    )
