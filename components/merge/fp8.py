"""The merged model in FP8, beside the one in 16 bits, and what that costs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from finemill.artifacts.chain import ChainLink
from finemill.components.merge.parity import link_of_logits, logits_of
from finemill.errors import UserError
from finemill.models.fp8 import checkpoint_shapes, rounded_inputs, rounded_model, write_checkpoint
from finemill.models.model_card import CardText
from finemill.models.nf4.layers import quantized_layers
from finemill.models.stored_model import StoredModel
from finemill.models.write_weights import total_bytes, type_beside

FOLDER = "merged_fp8"
"""Its place in the merged model's folder."""
CARD = CardText(
    "Merged model in FP8",
    "fp8",
    "The merged model one folder up in FP8 (compressed-tensors, W8A8, dynamic), by finemill.",
)


def fp8_bytes(stored: StoredModel, dtype: torch.dtype) -> int:
    """Bytes of the weights. Raises: UserError: a mixture of experts."""
    if stored.num_experts:
        raise UserError(
            "merge: merged_fp8 does not fit a mixture of experts, whose rounding is not measured here: leave it out, "
            "and quantize with gguf-quantize"
        )
    return total_bytes(checkpoint_shapes(stored, quantized_layers(stored), type_beside(dtype)))


def write_fp8_model(merged: StoredModel, dtype: torch.dtype) -> None:
    """Write every linear layer but the output layer in FP8 into `FOLDER`."""
    folder = merged.folder / FOLDER
    folder.mkdir()
    write_checkpoint(merged, set(quantized_layers(merged)), type_beside(dtype), folder)


def fp8_link(
    folder: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]], expected: Sequence[torch.Tensor]
) -> ChainLink:
    """How far the model in FP8, inputs too, is from the merged one in `folder`, whose logits are `expected`."""
    quantized = set(quantized_layers(StoredModel(folder)))
    rounded = rounded_model(folder, quantized, type_beside(dtype))
    with rounded_inputs(rounded.model, quantized):
        found = logits_of(rounded.model, rounded, prompts)
    return link_of_logits("merged, FP8", "merged", prompts, expected, found)
