"""What a base that is quantized on the disk allows. Without torch: preflight asks, too."""

from collections.abc import Mapping
from typing import Any

from finemill.errors import UserError
from finemill.training.config import LoRATrainingConfig

_SETTINGS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def check_stored_bits(model: Mapping[str, Any], config: LoRATrainingConfig, where: str) -> None:
    """Look whether the weights can be trained on as they are stored.

    Args:
        model: the base's config.json.
        config: what is trained, and how.
        where: what the base is called.
    Raises: UserError: they are quantized otherwise than in 4 bits of bitsandbytes', or not as it is asked for.
    """
    stored = model.get("quantization_config") or model.get("compression_config")
    if not isinstance(stored, Mapping):
        return
    if not stored.get("load_in_4bit"):
        kind = "LLM.int8" if stored.get("load_in_8bit") else stored.get("quant_method", "an unknown method")
        raise UserError(
            f"the base model in {where} is stored quantized by {kind}, which is not trained on: pass the unquantized "
            "model, whose weights are quantized while it is loaded"
        )
    reasons = {
        f"{config.bits} bits": config.bits != 4,
        f"strategy '{config.strategy}'": config.strategy in ("fsdp2", "zero3"),
        "init_lora_weights 'loftq'": config.init_lora_weights == "loftq",
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        raise UserError(
            f"the base model in {where} is stored in 4 bits, and {reason} cannot be had of it: use load_in_4bit "
            "with a whole copy on each GPU, or pass the unquantized model"
        )
    for name in _SETTINGS:
        asked, default = getattr(config, name), type(config).model_fields[name].default
        if asked != default and asked != stored.get(name, asked):
            raise UserError(
                f"{name} {asked!r} has no effect on the base model in {where}, which is stored with {stored[name]!r}: "
                "leave it out, or pass the unquantized model"
            )
