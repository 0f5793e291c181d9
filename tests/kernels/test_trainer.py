"""FastSFTTrainer logs what SFTTrainer logs, step by step, on packed, padded and accumulated batches."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import SFTConfig, SFTTrainer

from finemill.kernels.trainer import FastSFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with transformers in float32 on a CPU"),
]


def train(trainer_class, tmp_path, *, packing: bool, accumulation: int):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    vocabulary = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="t0", eos_token="t2", unk_token="t1")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 30, (24,), generator=generator).tolist()
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=32,
        packing=packing,
        dataset_kwargs={"skip_prepare_dataset": not packing},
        max_grad_norm=0.2,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_config(config),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 2 + row[2:] for row in rows]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy")
    history = [[float(entry[name]) for name in names] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(history), trainer


@pytest.mark.parametrize(("packing", "accumulation"), [(False, 2), (True, 1)])
def test_every_logged_number_equals_trls(packing, accumulation, tmp_path):
    expected, _ = train(SFTTrainer, tmp_path, packing=packing, accumulation=accumulation)
    got, trainer = train(FastSFTTrainer, tmp_path, packing=packing, accumulation=accumulation)
    assert trainer.fast
    assert expected.shape == (4, 5)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_optimizer_state_survives_saving(tmp_path):
    _, trainer = train(FastSFTTrainer, tmp_path, packing=False, accumulation=1)
    state = trainer.optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    trainer.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    moments = trainer.optimizer.state_dict()["moments"]
    assert all(torch.equal(moments[name], tensor) for name, tensor in state["moments"].items())
