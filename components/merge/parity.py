"""Whether the written model is base plus adapter: equal logits, equal prompts."""

# T tokens, V vocabulary

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.adapter import has_tokenizer
from finemill.errors import StepError

# Plain text, arithmetic, code, other scripts: together they pass through every layer with varied activations.
_QUESTIONS = (
    "What is 17 plus 25?",
    "Ann has 12 apples and gives 5 away. How many are left?",
    "Name three colours and say which you like best.",
    "def area(width, height):\n    return width * height",
    "Translate 'good morning' into French, German and 日本語.",
    "Hello! My name is Max. What is my name?",
)


def probe_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of a few chats, with and without thinking; bare text where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        return [tokenizer(question)["input_ids"] for question in _QUESTIONS]
    return [
        tokenizer(_render(tokenizer, question, thinking), add_special_tokens=False)["input_ids"]
        for question in _QUESTIONS
        for thinking in (True, False)
    ]


def _render(tokenizer: Any, question: str, thinking: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return text


@torch.inference_mode()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of each prompt, shape (T, V), float32."""
    return [model(torch.tensor([list(prompt)], device=model.device)).logits[0].float().cpu() for prompt in prompts]


def compare_logits(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far `found` is from `expected`, each a list of logits of shape (T, V).

    Returns: `max_abs_diff` of any logit; `kl`, the mean over tokens of KL(expected || found) in nats; `top1_agreement`,
        the share of tokens with the same likeliest next token.
    """
    expected_TV, found_TV = torch.cat(list(expected)).double(), torch.cat(list(found)).double()
    log_p_TV, log_q_TV = expected_TV.log_softmax(-1), found_TV.log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    return {
        "max_abs_diff": float((expected_TV - found_TV).abs().max()),
        "kl": max(float(kl_T.mean()), 0.0),
        "top1_agreement": float((expected_TV.argmax(-1) == found_TV.argmax(-1)).double().mean()),
    }


def check_chat_template(adapter: Path, merged: Path) -> None:
    """Raises: StepError: the merged folder renders a chat otherwise than the adapter's tokenizer."""
    from transformers import AutoTokenizer

    if not has_tokenizer(adapter):
        return
    before, after = (AutoTokenizer.from_pretrained(folder, trust_remote_code=False) for folder in (adapter, merged))
    if probe_prompts(before) != probe_prompts(after) or before.chat_template != after.chat_template:
        raise StepError("merge: the merged model's chat template differs from the adapter's")
