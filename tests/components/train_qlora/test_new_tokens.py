"""Tokens that the base does not know: learned, merged and opened as everybody else opens them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finemill.artifacts.adapter import read_training
from finemill.artifacts.dataset import ADDED_TOKENS_FILE, IGNORE_INDEX, LabelledRow, take_new_tokens
from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import write_rows
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.step import run as merge
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.step import run as train_qlora
from finemill.errors import UserError
from finemill.models.adapter import load_adapter
from finemill.runtime.context import StepContext

SETTINGS: dict[str, Any] = {
    "load_in_4bit": False,
    "lora_r": 4,
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.0,
    "eval_steps": 10,
    "save_steps": 7,
}
MakeContext = Callable[[], StepContext]


@pytest.fixture(scope="module")
def spoken(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose answers are one of two tokens that the base lacks, and a few that it has."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / ADDED_TOKENS_FILE).write_text(json.dumps({"<yes>": 1536, "<no>": 1537}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    assert take_new_tokens(folder, tokenizer) == [1536, 1537]
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        rows = []
        for number in range(4, 12):
            prompt = tokenizer(f"Is {number} even?")["input_ids"]
            answer = tokenizer(f"<{'no' if number % 2 else 'yes'}> so it is.")["input_ids"]
            rows.append(LabelledRow(input_ids=prompt + answer, labels=[IGNORE_INDEX] * len(prompt) + answer))
        write_rows(split_path(folder, split), LabelledRow, rows)
    return folder


@pytest.fixture(scope="module")
def roomy_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with an output matrix of its own, and rows that no token has."""
    folder = Path(shutil.copytree(base_model, tmp_path_factory.mktemp("roomy") / "base"))
    weights = load_file(folder / "model.safetensors")
    embedding = torch.cat([weights["model.embed_tokens.weight"], torch.zeros(64, 256, dtype=torch.bfloat16)])
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"tie_word_embeddings": False, "vocab_size": 1600}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def losses_on(model: Any, dataset: Path) -> float:
    """Mean loss per label of the validation rows."""
    from finemill.components.train_qlora.rows import load_rows

    total = count = 0.0
    with torch.no_grad():
        for row in load_rows(dataset, "validation", 64):
            labels = torch.tensor([row["labels"]])
            number = int((labels[:, 1:] != IGNORE_INDEX).sum())
            total += number * model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
            count += number
    return total / count


@pytest.mark.parametrize("rows", [1538, 1600])
def test_new_tokens_are_learned_and_are_in_the_merged_model(
    rows: int, make_context: MakeContext, base_model: Path, roomy_model: Path, spoken: Path, tmp_path: Path
) -> None:
    folder = roomy_model if rows == 1600 else base_model
    config = TrainQLoRAConfig(**SETTINGS)
    adapter, again, merged = tmp_path / "adapter", tmp_path / "again", tmp_path / "merged"
    for output in (adapter, again):  # the second goes on from the first one's checkpoint
        train_qlora(base_model=folder, dataset=spoken, output_dir=output, config=config, context=make_context())
    trained, resumed = (load_file(path / "adapter_model.safetensors") for path in (adapter, again))
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    deltas = [name for name in trained if "trainable_tokens_delta" in name]
    assert len(deltas) == (2 if rows == 1600 else 1)
    assert not any("embed_tokens.weight" in name or "lm_head.weight" in name for name in trained)
    training = read_training(adapter)
    assert training is not None
    ((_, learned),) = training.validation_losses
    assert learned < 2

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.resize_token_embeddings(max(rows, len(base.get_input_embeddings().weight)), mean_resizing=False)
    assert losses_on(PeftModel.from_pretrained(base, adapter).eval(), spoken) == pytest.approx(learned, abs=1e-4)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_adapter(base, adapter)
    assert losses_on(ours, spoken) == pytest.approx(learned, abs=1e-4)
    with ours.disable_adapter():
        assert losses_on(ours, spoken) > learned + 2

    references = {**make_context().references, "adapter": "adapter"}
    merge(
        base_model=folder,
        adapter=adapter,
        output_dir=merged,
        config=MergeConfig(dtype="float32"),
        context=replace(make_context(), references=references),
    )
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert (model.config.vocab_size, len(model.get_output_embeddings().weight)) == (rows, rows)
    assert model.config.tie_word_embeddings is (rows == 1538)
    assert losses_on(model, spoken) == pytest.approx(learned, abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.convert_tokens_to_ids(["<yes>", "<no>"]) == [1536, 1537]
    ids = torch.tensor([tokenizer("Is 6 even?")["input_ids"]])
    answer = model.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) in ("<yes>", "<no>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernels": "on"}, "kernels 'on', and the data set has 2 new tokens"),
        ({"strategy": "fsdp2"}, "strategy 'fsdp2' cuts or divides the embeddings"),
    ],
)
def test_new_tokens_are_refused_where_their_rows_cannot_be_trained(
    settings: dict[str, Any], message: str, make_context: MakeContext, base_model: Path, spoken: Path, tmp_path: Path
) -> None:
    config = TrainQLoRAConfig(**SETTINGS | settings)
    with pytest.raises(UserError, match=message):
        train_qlora(base_model=base_model, dataset=spoken, output_dir=tmp_path, config=config, context=make_context())


def test_a_data_set_whose_tokens_have_other_ids_with_this_base_is_refused(
    make_context: MakeContext, base_model: Path, tmp_path: Path
) -> None:
    (tmp_path / ADDED_TOKENS_FILE).write_text(json.dumps({"<yes>": 32000}), encoding="utf-8")
    config = TrainQLoRAConfig(**SETTINGS)
    with pytest.raises(UserError, match="has <yes> as token 32000, and with this base model it is 1536"):
        train_qlora(
            base_model=base_model, dataset=tmp_path, output_dir=tmp_path / "a", config=config, context=make_context()
        )
