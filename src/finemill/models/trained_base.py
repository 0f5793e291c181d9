"""The base as a training computed with it: rounded to 4 bits and decoded again."""

from collections.abc import Collection, Mapping
from functools import partial

import torch

from finemill.models.nf4.encode import QuantType, round_trip
from finemill.models.nf4.layers import quantized_layers
from finemill.models.stored_model import Rounding, StoredModel


def trained_rounding(
    stored: StoredModel, settings: Mapping[str, object], in_16_bits: Collection[str] = ()
) -> Rounding | None:
    """What a training with `settings` made of each weight of its base; None where it took the base as it is.

    None, too, where that is not known: of an adapter that was not made here, in 8 bits, begun by LoftQ, or of a mixture
    of experts.

    Args:
        settings: the training step's configuration.
        in_16_bits: layers that a base which is in 4 bits on the disk keeps.
    """
    quant_type = settings.get("bnb_4bit_quant_type")
    is_4_bit = settings.get("load_in_4bit") and not settings.get("load_in_8bit") and settings.get("method") != "full"
    # LoftQ's adapter is saved for the unquantized base: on the rounded one it is another.
    is_known = settings.get("init_lora_weights") != "loftq" and not stored.num_experts
    if not is_4_bit or not is_known or quant_type not in ("nf4", "fp4"):
        return None
    layers = set(quantized_layers(stored)) - set(in_16_bits)
    dtype = stored.dtype if stored.dtype.itemsize == 2 else torch.bfloat16
    return partial(_round, layers, dtype, quant_type, bool(settings.get("bnb_4bit_use_double_quant")))


def _round(
    layers: Collection[str],
    dtype: torch.dtype,
    quant_type: QuantType,
    double_quant: bool,
    name: str,
    values: torch.Tensor,
) -> torch.Tensor:
    if not (name.endswith(".weight") and name.removesuffix(".weight") in layers):
        return values
    return round_trip(values, dtype, quant_type=quant_type, double_quant=double_quant)
