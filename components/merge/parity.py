"""Whether the written model is base plus adapter: equal logits on a few prompts."""

# B prompts, T tokens, V vocabulary

from collections.abc import Sequence
from typing import Any

import torch

from finemill.artifacts.chain import ChainLink
from finemill.metrics.chain import Position, chain_link
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import streamed

# Plain text, arithmetic, code, other scripts: together they pass through every layer with varied activations.
_QUESTIONS = (
    "What is 17 plus 25?",
    "Ann has 12 apples and gives 5 away. How many are left?",
    "Name three colours and say which you like best.",
    "def area(width, height):\n    return width * height",
    "Translate 'good morning' into French, German and 日本語.",
    "Hello! My name is Max. What is my name?",
)


# Prompts without thinking differ in their ends alone, and every one takes its time.
_WITHOUT_THINKING = 2


def probe_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of a few chats, some of them without thinking; bare text where no chat template takes them."""
    try:
        texts = [_render(tokenizer, question, thinking=True) for question in _QUESTIONS]
        texts += [_render(tokenizer, question, thinking=False) for question in _QUESTIONS[:_WITHOUT_THINKING]]
    # Templates are programs of other people: some want a system message, tools or another role, some divide by 0.
    except Exception:
        texts = []
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in dict.fromkeys(texts)]
    # Some write nothing.
    return prompts if prompts and all(prompts) else [tokenizer(question)["input_ids"] for question in _QUESTIONS]


def _render(tokenizer: Any, question: str, *, thinking: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return text


@torch.inference_mode()
def logits_of(model: Any, stored: StoredModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of each prompt, shape (T, V), float32, computed with one layer in memory at a time.

    Args:
        model: `stored.model`, or that with adapters of PEFT on it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = max(len(prompt) for prompt in prompts)
    # Tokens look back only: what fills a prompt up on the right changes nothing before it.
    padded = torch.tensor([[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts], device=device)
    with streamed(model, stored, device):
        logits_BTV = model(input_ids=padded, use_cache=False).logits
    return [logits_TV[: len(prompt)].float().cpu() for prompt, logits_TV in zip(prompts, logits_BTV, strict=True)]


def compare_logits(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far `found` is from `expected`, each a list of logits of shape (T, V).

    Returns: `max_abs_diff` of any logit; `kl`, the mean over tokens of KL(expected || found) in nats; `top1_agreement`,
        the share of tokens with the same likeliest next token.
    """
    kl, agrees, largest = [], [], []
    # One prompt at a time: in float64, the logits of all would be the largest thing in memory.
    for expected_TV, found_TV in zip(expected, found, strict=True):
        log_p_TV, log_q_TV = expected_TV.double().log_softmax(-1), found_TV.double().log_softmax(-1)
        kl.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1))
        agrees.append(expected_TV.argmax(-1) == found_TV.argmax(-1))
        largest.append((expected_TV.double() - found_TV.double()).abs().max())
    return {
        "max_abs_diff": float(torch.stack(largest).max()),
        "kl": max(float(torch.cat(kl).mean()), 0.0),
        "top1_agreement": float(torch.cat(agrees).double().mean()),
    }


def link_of_logits(
    name: str,
    against: str,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
) -> ChainLink:
    """The link from `against`, whose logits are `expected`, to `name`, at each token of `prompts` but the last."""
    positions = []
    for row, (prompt, expected_TV, found_TV) in enumerate(zip(prompts, expected, found, strict=True)):
        log_p_TV, log_q_TV = expected_TV[:-1].double().log_softmax(-1), found_TV[:-1].double().log_softmax(-1)
        following = torch.tensor(prompt[1:])[:, None]
        columns = (
            (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).tolist(),
            (-log_p_TV.gather(-1, following))[:, 0].tolist(),
            (-log_q_TV.gather(-1, following))[:, 0].tolist(),
            (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).tolist(),
        )
        positions += [Position(row, *values) for values in zip(*columns, strict=True)]
    return chain_link(name, against, positions)
