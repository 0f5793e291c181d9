from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from finemill.models.adapter import load_adapter
from finemill.models.adapter_rows import adapter_by_row
from finemill.models.batching import choose, generate_continuously, supports_continuous_batching
from finemill.models.causal_lm import load_causal_lm
from finemill.models.generation import generate_answers, read_answer, stop_token_ids
from finemill.models.sampling import GREEDY, Sampling

TEXTS = ("What is 3 + 4?", "Hi, I am Ben.", "Ada has 20 pens and gets 5 more. How many is that?", "What color is snow?")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def tuned(tiny_model_dir: Path, tiny_adapter_dir: Path) -> Any:
    return load_adapter(load_causal_lm(tiny_model_dir, dtype=torch.float32), tiny_adapter_dir)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": text}] for text in TEXTS * 3]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(("batch_size", "columns"), [(1, 256), (3, 256), (5, 4), (64, 256)])
def test_base_and_tuned_in_one_pass_answer_as_each_does_alone(
    tuned: Any,
    tokenizer: Any,
    tiny_model_dir: Path,
    prompts: list[list[int]],
    batch_size: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("finemill.models.row_cache._COLUMNS", columns)
    monkeypatch.setattr("finemill.models.row_cache._WORTH_MOVING", 2)
    stops = stop_token_ids(tokenizer, tiny_model_dir)
    options: dict[str, Any] = {"stop_token_ids": stops, "max_new_tokens": 16}
    expected = generate_answers(tuned, tokenizer, prompts, **options)
    with tuned.disable_adapter():
        expected += generate_answers(tuned, tokenizer, prompts, **options)
    on = [True] * len(prompts) + [False] * len(prompts)
    with adapter_by_row(tuned) as rows:
        written = generate_continuously(
            tuned,
            [*prompts, *prompts],
            stop_token_ids=stops,
            max_new_tokens=[16] * len(on),
            sampling=GREEDY,
            batch_size=batch_size,
            on_batch=lambda indices: rows.set([on[index] for index in indices]),
        )
    assert [read_answer(tokenizer, ids, stops) for ids in written] == expected


def test_a_row_without_the_adapter_gets_what_the_base_gives(tuned: Any) -> None:
    input_ids = torch.tensor([[5, 17, 200], [5, 17, 200]])
    with torch.inference_mode():
        with tuned.disable_adapter():
            base = tuned(input_ids=input_ids).logits
        own = tuned(input_ids=input_ids).logits
        with adapter_by_row(tuned) as rows:
            rows.set([False, True])
            mixed = tuned(input_ids=input_ids).logits
        after = tuned(input_ids=input_ids).logits
    torch.testing.assert_close(mixed[0], base[0], rtol=0, atol=0)
    torch.testing.assert_close(mixed[1], own[1])
    torch.testing.assert_close(after, own, rtol=0, atol=0)


def test_each_row_ends_at_its_own_length_and_progress_is_said(tuned: Any, prompts: list[list[int]]) -> None:
    lengths = [1 + number % 5 for number in range(len(prompts))]
    said: list[int] = []
    written = generate_continuously(
        tuned,
        prompts,
        stop_token_ids=[],
        max_new_tokens=lengths,
        sampling=GREEDY,
        batch_size=4,
        on_progress=said.append,
    )
    assert [len(ids) for ids in written] == lengths
    assert said == sorted(set(said))
    assert said[-1] == len(prompts)


def test_one_seed_draws_the_same_answers_and_another_others(tuned: Any, prompts: list[list[int]]) -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(1.5, 0.95, 40, 0.01, seed)
        return generate_continuously(
            tuned, prompts, stop_token_ids=[], max_new_tokens=[8] * len(prompts), sampling=sampling, batch_size=8
        )

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0, 1.0, 2), {0, 1}),
        (Sampling(1.0, 0.6), {0}),
        (Sampling(1.0, 1.0, 0, 0.5), {0}),
        (GREEDY, {0}),
    ],
)
def test_only_likely_tokens_are_drawn(sampling: Sampling, allowed: Sequence[int]) -> None:
    logits_BV = torch.tensor([[0.7, 0.2, 0.1]]).log().repeat(200, 1)
    assert set(choose(logits_BV, sampling, torch.Generator().manual_seed(0)).tolist()) == allowed


def test_a_model_with_a_sliding_window_is_answered_batch_by_batch(tuned: Any) -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8,
    )  # fmt: skip
    assert supports_continuous_batching(tuned)
    assert not supports_continuous_batching(Gemma3ForCausalLM(config))
