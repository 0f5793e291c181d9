"""On a GPU FastSFTTrainer trains in float16 with transformers' own scaler of the loss, as it does in bfloat16."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import SFTConfig

from finemill.kernels.trainer import FastSFTTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def losses(dtype: torch.dtype, folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 64}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    vocabulary = Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t1"))
    ids = torch.randint(3, 512, (8, 100)).tolist()
    trainer = FastSFTTrainer(
        model=AutoModelForCausalLM.from_config(config, dtype=dtype).cuda(),
        args=SFTConfig(
            output_dir=str(folder),
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            per_device_train_batch_size=8,
            max_steps=12,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            max_length=128,
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="t0", eos_token="t2"),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    assert trainer.fast, trainer.acceleration.reason
    assert (trainer._scaler is not None) == (dtype == torch.float16)
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_float16_learns_as_bfloat16_does(tmp_path: Path) -> None:
    half, brain = losses(torch.float16, tmp_path / "half"), losses(torch.bfloat16, tmp_path / "brain")
    assert half[-1] < half[0] - 0.5
    # The first steps may overflow and be left out, until the scale fits.
    assert (half[0] - brain[0]).abs() < 0.02
    assert (half[-1] - brain[-1]).abs() < 0.5 * (brain[0] - brain[-1])
