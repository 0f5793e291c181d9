"""The shipped base model has the shape, tokenizer and template that the rest of the line relies on."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.models.base.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS

FOLDER = BUILTIN_MODELS["builtin:tiny-qwen3"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in Path(FOLDER).iterdir()) < 12e6


def test_every_matrix_is_bfloat16_with_rows_that_k_quants_take() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (safe_open has no iterator)
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert tensor.ndim == 1 or tensor.shape[-1] % 256 == 0, name


@pytest.mark.parametrize(
    "text", ["Mia has 12 apples.", "naïve café — 東京 🙂", "a\tb\r\n\n  c", '{"x": [1, 2]}', r"\boxed{7}", "<|im_end|>"]
)
def test_any_text_survives_the_tokenizer(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_added_tokens_are_qwen3s_and_come_last(tokenizer: PreTrainedTokenizerBase) -> None:
    first = len(tokenizer) - len(SPECIAL_TOKENS) - len(ADDED_TOKENS)
    assert tokenizer.convert_ids_to_tokens(list(range(first, len(tokenizer)))) == [*SPECIAL_TOKENS, *ADDED_TOKENS]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("12")["input_ids"] == tokenizer.convert_tokens_to_ids(["1", "2"])


def test_template_switches_thinking_as_qwen3_does(tokenizer: PreTrainedTokenizerBase) -> None:
    def render(**options: bool) -> str:
        user = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True, **options)
        assert isinstance(text, str)
        return text

    assert render() == render(enable_thinking=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(enable_thinking=False) == render() + "<think>\n\n</think>\n\n"


def test_knows_arithmetic(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    facts = ["17 + 25 = 42", "90 - 34 = 56", "8 * 12 = 96", "84 / 7 = 12", "63 + 118 = 181"]
    for fact in facts:
        question = fact[: fact.index("=") + 1]
        prompt = tokenizer(f"5 + 2 = 7\n{question}", return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=len(fact) - len(question) + 1, do_sample=False)
        assert tokenizer.decode(tokens[0]).splitlines()[1] == fact
