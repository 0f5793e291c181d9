from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finemill.models.token_rows import begin_token_rows, tokens_without_row


@pytest.mark.parametrize(("token_ids", "rows"), [([1530, 1535], 1536), ([1536, 1537], 1538)])
def test_new_tokens_begin_as_the_mean_of_those_before_them(
    token_ids: list[int], rows: int, short_model_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(short_model_dir, dtype=torch.float32)
    before = model.get_input_embeddings().weight.detach().clone()
    begin_token_rows(model, token_ids)
    weight = model.get_input_embeddings().weight
    assert len(weight) == model.config.vocab_size == rows
    assert model.get_output_embeddings().weight is weight
    mean = before[: token_ids[0]].mean(0)
    for token in token_ids:
        torch.testing.assert_close(weight[token], mean, rtol=0.01, atol=1e-6)
        assert torch.equal(weight[token].bfloat16().float(), weight[token])
    others = [row for row in range(min(rows, 1536)) if row not in token_ids]
    assert torch.equal(weight[others], before[others])


def test_a_token_for_pictures_alone_needs_no_row(short_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(short_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>", "<new>"]})
    assert tokens_without_row(tokenizer, 1537) == {1537: "<new>"}
