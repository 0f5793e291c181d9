"""The merged model in GPTQ's format, beside the one in 16 bits, and what that costs."""

# O output width, I input width of a layer, G groups of inputs

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from finemill.artifacts.chain import ChainLink
from finemill.artifacts.dataset import read_held_out, spread
from finemill.artifacts.manifest import Reference
from finemill.components.merge.parity import link_of_logits, logits_of
from finemill.errors import UserError
from finemill.models.model_card import CardText
from finemill.models.stored_model import StoredModel
from finemill.models.weights import StoredTensor, stored_tensors
from finemill.runtime.context import StepContext
from finemill.storage.store import fetch_artifact

FOLDER = "merged_gptq"
"""Its place in the merged model's folder."""
CARD = CardText(
    "Merged model in 4 bits, GPTQ's format",
    "gptq",
    "The merged model one folder up in GPTQ's format (4 bits, groups of 128), rounded by AutoRound on rows "
    "of the training set, by finemill.",
)

_ROWS, _TOKENS = 128, 512
_BITS = torch.arange(0, 32, 4)
# Each layer's 16 bits again at most, and half of them for scales and the rest.
_BYTES_PER_VALUE = 0.6


def calibration_rows(stored: StoredModel, context: StepContext) -> list[list[int]]:
    """Rows that the adapter was trained on, each of at most `_TOKENS` tokens.

    Raises: UserError: a mixture of experts, AutoRound is not installed, or nothing says what the adapter learned from.
    """
    if stored.num_experts:
        raise UserError(
            "merge: merged_gptq does not fit a mixture of experts, whose rounding is not measured here: leave it out, "
            "and quantize with gguf-quantize"
        )
    _auto_round()
    manifest = context.manifests.get("adapter")
    dataset = manifest.parents.get("dataset") if manifest else None
    if not dataset:
        raise UserError(
            "merge: merged_gptq is calibrated on the rows that the adapter was trained on, and the adapter does not "
            "say which: pass one of train-qlora or train-dpo, or leave it out"
        )
    rows = read_held_out(fetch_artifact(Reference.parse(dataset))[0], "train")
    return [row.input_ids[:_TOKENS] for row in spread(rows, _ROWS)]


def gptq_bytes(stored: StoredModel) -> int:
    """Bytes of the weights, or a few more."""
    return int(stored.num_elements * _BYTES_PER_VALUE) + 4 * stored.shape_of(stored.embedding_name)[0]


def write_gptq_model(
    merged: Path, dtype: torch.dtype, tokenizer: Any, rows: Sequence[Sequence[int]], steps: int
) -> None:
    """Write every linear layer but the output layer in 4 bits into `FOLDER`; the whole model is in memory."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)
    longest = max(map(len, rows))
    batches = [
        {
            "input_ids": torch.tensor([[*row, *[row[-1]] * (longest - len(row))]]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row))]),
        }
        for row in rows
    ]
    with TemporaryDirectory(prefix="finemill-gptq-", dir=merged) as folder:
        rounding = _auto_round()(
            model, tokenizer, scheme="W4A16", dataset=batches, nsamples=len(rows), seqlen=longest, iters=steps,
            batch_size=min(8, len(rows)), device_map=device, seed=0,
        )  # fmt: skip
        rounding.quantize_and_save(folder, format="auto_gptq")
        written = next(path.parent for path in Path(folder).rglob("config.json"))
        shutil.move(written, merged / FOLDER)


def _auto_round() -> Any:
    """Raises: UserError: it is not installed."""
    try:
        from auto_round import AutoRound
    except ImportError as error:
        raise UserError(
            f"merge: merged_gptq is rounded by AutoRound ({error}): pip install 'finemill[gptq]', or leave it out"
        ) from None
    logging.getLogger("autoround").setLevel(logging.ERROR)
    return AutoRound


def gptq_link(folder: Path, prompts: Sequence[Sequence[int]], expected: Sequence[torch.Tensor]) -> ChainLink:
    """How far the model in GPTQ's format is from the merged one in `folder`, whose logits are `expected`."""
    tensors = stored_tensors(folder / FOLDER)
    rounded = StoredModel(folder, lambda name, values: _rounded(tensors, name, values))
    return link_of_logits("merged, GPTQ", "merged", prompts, expected, logits_of(rounded.model, rounded, prompts))


def _rounded(tensors: Mapping[str, StoredTensor], name: str, values: torch.Tensor) -> torch.Tensor:
    layer = name.removesuffix(".weight")
    if f"{layer}.qweight" not in tensors:
        return values
    codes, zeros, scales_GO = (_read(tensors, f"{layer}.{part}") for part in ("qweight", "qzeros", "scales"))
    return decode(codes, zeros, scales_GO)


def _read(tensors: Mapping[str, StoredTensor], key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(tensors[key].path, framework="pt") as file:
        values: torch.Tensor = file.get_tensor(key)
        return values


def decode(codes: torch.Tensor, zeros: torch.Tensor, scales_GO: torch.Tensor) -> torch.Tensor:
    """The weight, shape (O, I), of a layer as servers compute it, float32.

    Args:
        codes: eight inputs of an output in a number, shape (I / 8, O).
        zeros: the codes of zero less 1, eight outputs in a number, shape (G, O / 8).
    """
    codes_IO = (codes[:, None] >> _BITS[:, None] & 15).flatten(0, 1)
    zeros_GO = (zeros[..., None] >> _BITS & 15).flatten(1) + 1
    width = len(codes_IO) // len(scales_GO)
    codes_GwO = codes_IO.view(-1, width, codes_IO.shape[1]) - zeros_GO[:, None]
    return (codes_GwO * scales_GO.float()[:, None]).flatten(0, 1).T.contiguous()
