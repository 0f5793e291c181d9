from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.models.base.pretrain import (
    Recipe,
    labels_of,
    make_tokenizer,
    model_config,
    pack_shard,
    perturbed,
    pretrain,
)

RECIPE = Recipe(steps=4, rows_per_step=4, warmup_steps=1, row_length=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(RECIPE)


@pytest.fixture(scope="module")
def rows_RT(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return pack_shard((str(folder), RECIPE.seed, 0, RECIPE.row_length))[: RECIPE.steps * RECIPE.rows_per_step]


def test_the_shipped_tokenizer_is_the_recipes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from finemill.models.base.resolve import BUILTIN_MODELS

    tokenizer.save_pretrained(tmp_path)
    shipped = BUILTIN_MODELS["builtin:tiny-qwen3"] / "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped.read_bytes()


def test_rows_begin_with_a_whole_document_and_end_in_padding(
    rows_RT: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert rows_RT.shape == (16, 64)
    assert (rows_RT[:, -1] == tokenizer.pad_token_id).all()
    assert (rows_RT[:, 0] != tokenizer.pad_token_id).all()


def test_only_the_first_end_of_text_after_a_document_is_learned() -> None:
    labels = labels_of(torch.tensor([[5, 6, 0, 7, 0, 0, 0]]), pad_token_id=0)
    assert labels.tolist() == [[5, 6, 0, 7, 0, IGNORE_INDEX, IGNORE_INDEX]]


def test_noise_on_the_weights_is_taken_away_again() -> None:
    weight = torch.randn(8, 8)
    before = weight.clone()
    with perturbed([weight], 0.1):
        assert not torch.equal(weight, before)
    torch.testing.assert_close(weight, before)


def test_the_same_recipe_gives_the_same_weights_and_a_falling_loss(
    rows_RT: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> None:
    def train() -> tuple[Qwen3ForCausalLM, float]:
        torch.manual_seed(RECIPE.seed)
        model = Qwen3ForCausalLM(model_config(RECIPE, tokenizer))
        batches = np.split(rows_RT, RECIPE.steps)
        pretrain(RECIPE, batches, model, torch.device("cpu"))
        tokens = torch.from_numpy(rows_RT[:4].astype(np.int64))
        with torch.no_grad():
            return model, model(input_ids=tokens, labels=tokens).loss.item()

    (first, loss), (second, _) = train(), train()
    assert loss < np.log(RECIPE.vocab_size)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=0, msg=name)
