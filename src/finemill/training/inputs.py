"""What every training begins with: base, data set, the tokenizer of the tuned model, the device."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from finemill.artifacts.dataset import take_chat_template, take_new_tokens
from finemill.errors import UserError
from finemill.models.nf4.config import is_quantized
from finemill.models.stored_model import StoredModel
from finemill.runtime.processes import num_processes
from finemill.training.adapter import lora_config
from finemill.training.config import ConfigT
from finemill.training.new_tokens import with_new_tokens
from finemill.training.stored_bits import check_stored_bits
from finemill.training.strategy import check_strategy


@dataclass(frozen=True)
class TrainingInputs:
    """Folders of base and data set; a tokenizer with the template that the data were written with; the device.

    `new_tokens` are the ids of tokens that the base does not know.
    """

    base_model: Path
    dataset: Path
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    new_tokens: tuple[int, ...] = ()


def open_inputs(base_model: Path, dataset: Path, config: ConfigT) -> tuple[TrainingInputs, ConfigT]:
    """Look at all that a training begins with, before anything is loaded.

    Returns: the inputs, and the configuration as tokens that the base does not know need it.
    Raises: UserError: what the machine or the base does not have is asked for.
    """
    check_strategy(config)
    check_stored_bits(json.loads((base_model / "config.json").read_text(encoding="utf-8")), config, str(base_model))
    if not is_quantized(base_model):
        # transformers would begin weights that are missing at random.
        model = StoredModel(base_model).model
        if model.base_model is model:
            raise UserError(
                f"{type(model).__name__} has no part of its own below the output layer, where TRL's losses begin: it "
                "cannot be trained"
            )
    lora_config(base_model, config)
    device = choose_device()
    if config.use_dora and config.bits == 8 and device.type == "cpu":
        raise UserError(
            "use_dora on 8 bits needs a GPU: on a CPU bitsandbytes loses its weights' scales after a step: "
            "use 4 bits or 16"
        )
    tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
    take_chat_template(dataset, tokenizer)
    new_tokens = tuple(take_new_tokens(dataset, tokenizer))
    inputs = TrainingInputs(base_model, dataset, tokenizer, device, new_tokens)
    return inputs, with_new_tokens(config, len(new_tokens))


def check_tokens(inputs: TrainingInputs, largest: int) -> None:
    """Compare the largest token id of the rows with the base's vocabulary.

    Raises: UserError: the base has no embedding for it, as where chat-format was given another base.
    """
    config = AutoConfig.from_pretrained(inputs.base_model, local_files_only=True, trust_remote_code=False)
    known = max(config.get_text_config().vocab_size, *(token + 1 for token in inputs.new_tokens), 0)
    if largest >= known:
        raise UserError(
            f"the data set has token {largest}, and the base model in {inputs.base_model} knows {known} tokens: run "
            "chat-format with this base model"
        )


def choose_device() -> torch.device:
    """The GPU of this process, or the CPU. Raises: UserError: there are not as many processes here as visible GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus, num_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or num_processes())
    if num_gpus != num_here:
        raise UserError(
            f"{num_gpus} GPUs are visible to {num_here} processes: start one a GPU (torchrun --nproc-per-node), or "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
