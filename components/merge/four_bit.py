"""The merged model in bitsandbytes' NF4, beside the one in 16 bits, and what that costs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from finemill.artifacts.chain import ChainLink
from finemill.components.merge.parity import link_of_logits, logits_of
from finemill.errors import UserError
from finemill.models.model_card import CardText
from finemill.models.nf4.checkpoint import checkpoint_shapes, write_checkpoint
from finemill.models.nf4.layers import quantized_layers, skip_modules
from finemill.models.stored_model import StoredModel
from finemill.models.trained_base import trained_rounding
from finemill.models.write_weights import total_bytes, type_beside

FOLDER = "merged_4bit"
"""Its place in the merged model's folder."""
CARD = CardText(
    "Merged model in 4 bits",
    "bitsandbytes",
    "The merged model one folder up in bitsandbytes' NF4, by finemill. `finemill quantize-4bit` makes one "
    "that keeps 16 bits where NF4 costs most on rows of yours.",
)

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def four_bit_bytes(stored: StoredModel, dtype: torch.dtype) -> int:
    """Bytes of the weights. Raises: UserError: a mixture of experts."""
    if stored.num_experts:
        raise UserError(
            "merge: merged_4bit does not fit a mixture of experts, whose stacks bitsandbytes leaves in 16 bits: leave "
            "it out, and quantize with gguf-quantize"
        )
    return total_bytes(checkpoint_shapes(stored, set(quantized_layers(stored)), type_beside(dtype)))


def write_four_bit_model(merged: StoredModel, dtype: torch.dtype) -> None:
    """Write every linear layer but the output layer in NF4, as Hugging Face's loaders want it, into `FOLDER`."""
    folder = merged.folder / FOLDER
    folder.mkdir()
    write_checkpoint(merged, set(quantized_layers(merged)), skip_modules(merged, ()), type_beside(dtype), folder)


def four_bit_link(folder: Path, prompts: Sequence[Sequence[int]], expected: Sequence[torch.Tensor]) -> ChainLink:
    """How far the model in 4 bits is from the merged one in `folder`, whose logits are `expected`."""
    rounding = trained_rounding(StoredModel(folder), _NF4)
    rounded = StoredModel(folder, rounding)
    return link_of_logits("merged, 4-bit", "merged", prompts, expected, logits_of(rounded.model, rounded, prompts))
