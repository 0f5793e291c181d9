"""The adapters on the base, and the files they are saved in."""

from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from finemill.artifacts.adapter import TrainingRecord, write_training
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
