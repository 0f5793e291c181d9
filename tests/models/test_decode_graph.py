from pathlib import Path
from typing import Any

import pytest
import torch

from finemill.models.adapter import load_adapter
from finemill.models.adapter_rows import adapter_by_row
from finemill.models.batching import generate_continuously
from finemill.models.causal_lm import load_causal_lm
from finemill.models.decode_graph import CaptureError, attend
from finemill.models.sampling import GREEDY


def test_attention_of_one_token_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, size, 16, generator=generator) for heads, size in ((8, 1), (2, 9), (2, 9))
    )
    mask = torch.rand(3, 1, 1, 9, generator=generator) < 0.7
    mask[..., -1] = True
    found, _ = attend(None, query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_attention_that_is_not_here_is_left_to_the_model() -> None:
    states = torch.zeros(1, 1, 1, 4)
    with pytest.raises(CaptureError, match="attention with softcap"):
        attend(None, states, states, states, torch.ones(1, 1, 1, 1, dtype=torch.bool), softcap=50.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.gpu
def test_a_graph_writes_what_the_model_writes(
    tiny_model_dir: Path, tiny_adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_causal_lm(tiny_model_dir, dtype=torch.float32).cuda()
    tuned = load_adapter(base, tiny_adapter_dir)
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 5, 30, 4, 6, 7, 8)]
    lengths = [12, 40, 8, 200, 30, 9, 16, 20]
    on = [row % 2 == 0 for row in range(len(prompts))]

    def written(with_graph: bool) -> list[list[int]]:
        with monkeypatch.context() as patch, adapter_by_row(tuned) as rows:
            if not with_graph:
                patch.setattr("finemill.models.batching.can_capture", lambda model: False)
            options: dict[str, Any] = {"stop_token_ids": [], "max_new_tokens": lengths, "sampling": GREEDY}
            return generate_continuously(
                tuned, prompts, batch_size=4, on_batch=lambda new: rows.set([on[row] for row in new]), **options
            )

    assert written(with_graph=True) == written(with_graph=False)
