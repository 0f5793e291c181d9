"""The adapters on the base, and the files they are saved in."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from finemill.artifacts.adapter import TrainingRecord, write_training
from finemill.errors import UserError
from finemill.models.base.resolve import ResolvedBase
from finemill.training.config import LoRATrainingConfig


def lora_config(config: LoRATrainingConfig) -> LoraConfig:
    """PEFT's description of the adapters."""
    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def check_target_modules(base_model: Path, config: LoRATrainingConfig) -> None:
    """Compare the named layers with those of the model in `base_model`, without its weights.

    Raises: UserError: a name that fits no layer, or one that takes no adapter. PEFT passes by a name that fits nothing
        as long as another one fits something.
    """
    if config.target_modules == "all-linear":
        return
    description = AutoConfig.from_pretrained(base_model, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(description)
    layers = {
        name: isinstance(module, nn.Linear | nn.Embedding) and module is not model.get_output_embeddings()
        for name, module in model.named_modules()
    }
    for target in config.target_modules:
        fitting = [takes for name, takes in layers.items() if name == target or name.endswith(f".{target}")]
        if not fitting or not all(fitting):
            problem = "is no layer that takes an adapter" if fitting else "fits no layer"
            there = dict.fromkeys(name.rpartition(".")[2] for name, takes in layers.items() if takes)
            raise UserError(f"target_modules: '{target}' {problem} of the base model; there are {', '.join(there)}")


def keep_adapters_in_float32(model: PeftModel) -> None:
    """Undo TRL's cast of the adapters to bfloat16: at small learning rates AdamW's updates would round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapter(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, output_dir: Path, base: ResolvedBase) -> None:
    """Write adapter, tokenizer with its chat template, and the training's log history.

    The adapter names its base as PEFT expects: the hub's name and commit where there is one, else the reference.
    """
    adapter = trainer.model.peft_config["default"]
    adapter.base_model_name_or_path = base.id.removeprefix("hf://").partition("@")[0] if base.revision else base.id
    adapter.revision = base.revision
    # Said outright: PEFT would ask the hub whether adapters were put on the embeddings' vocabulary.
    trainer.model.save_pretrained(output_dir, safe_serialization=True, save_embedding_layers=False)
    # PEFT's model card is an empty template with this machine's path to the base in it.
    (output_dir / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(output_dir)
    state = trainer.state
    record = TrainingRecord(max_steps=state.max_steps, log_history=tuple(state.log_history), base_digest=base.digest)
    write_training(output_dir, record)
