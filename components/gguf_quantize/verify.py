"""Compare a GGUF file, as llama.cpp runs it, with the merged model, as transformers runs it."""

# T tokens, V vocabulary

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finemill.artifacts.chain import ChainLink
from finemill.artifacts.dataset import IGNORE_INDEX, HeldOutRow
from finemill.errors import StepError
from finemill.metrics.chain import AnsweredProblem, Position, chain_link
from finemill.metrics.maths import judge
from finemill.models.generation import Answer
from finemill.models.llama_cpp import LlamaServer, Tools
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import log_probabilities
from finemill.rows.answers import final_answer, with_opening

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
_QUESTION = {"role": "user", "content": "What is 17 plus 25?"}
_NUMBER = {"type": "number", "description": 'a "number", as π'}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": _NUMBER, "b": _NUMBER}, "required": ["a", "b"]},
    },
}
_ARGUMENTS = {"a": 17, "b": 25}
# Nine characters: what Mistral's templates want of it.
_CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": _ARGUMENTS}}
_CALLED: Messages = [
    _QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": _CALL["id"], "content": "42"},
]
_CHATS: tuple[tuple[Messages, Tools], ...] = (
    ([_QUESTION], ()),
    ([{"role": "system", "content": "Be brief."}, _QUESTION, {"role": "assistant", "content": "42"}, _QUESTION], ()),
    ([_QUESTION], (_TOOL,)),
    (_CALLED, (_TOOL,)),
)
_CHAT_TOKENS = 8
# Every kind of piece that a split rule treats by itself: a file that differs on one of these has the wrong tokenizer.
PROBES = (
    "Hello, world! It's 3.14159 or 2,718; I'll say we've DON'T know.",
    "def f(x):\n    return x ** 2  # 100%\n\n\n\tprint(f(12345))",
    "  leading and trailing  \n \n\r\n  mixed\twhite space   ",
    "Größe, naïve façade, Ελληνικά, русский, العربية, हिन्दी",
    "中文字符和日本語のテキスト、한국어",
    "emoji 😀👩‍👩‍👧‍👦🇪🇺 and ½ ² ¾ Ⅷ",
    "<think>\n12 + 7 = 19\n</think>\n\n\\boxed{19}",
)
# Nats of a token whose probability underflows in float32.
_LARGEST_LOSS = 100.0
# Next-token probabilities asked of llama.cpp per position: more would be slow to pass as JSON.
MAX_PROBABILITIES = 4096


@dataclass(frozen=True)
class ComparedPosition:
    """The beginning of a row, the token that it goes on with, and what the merged model expects there.

    `log_probabilities` are of the next token, shape (V,), float64.
    """

    row: int
    prompt: list[int]
    next_token: int
    log_probabilities: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """What a file came to: metrics by name, and the link from the merged model to it."""

    metrics: dict[str, float]
    link: ChainLink


@dataclass(frozen=True)
class Reference:
    """What the merged model says: the yardstick for every file."""

    compared: list["ComparedPosition"]
    rows: list[HeldOutRow]
    prompts: list[list[int]]
    answers: list[Answer]

    @property
    def exact_match(self) -> float | None:
        """Share of `rows` with an answer that is right."""
        return exact_match(self.rows, self.answers)


def compared_positions(
    stored: StoredModel, rows: Sequence[HeldOutRow], count: int, context_length: int
) -> list[ComparedPosition]:
    """Beginnings of `rows`, at most `count` of each, and what the merged model expects after them."""
    ids = [row.input_ids[:context_length] for row in rows]
    lengths = [_positions(row.labels[:context_length], count) for row in rows]
    expected = log_probabilities(stored, ids, lengths)
    return [
        ComparedPosition(index, row[:length], row[length], after_V)
        for index, (row, beginnings, after_NV) in enumerate(zip(ids, lengths, expected, strict=True))
        for length, after_V in zip(beginnings, after_NV, strict=True)
    ]


def _positions(labels: Sequence[int], count: int) -> list[int]:
    """Evenly spread positions among the labelled tokens; the token there is predicted from those before it."""
    labelled = [position for position, label in enumerate(labels) if label != IGNORE_INDEX and position > 0]
    count = min(count, len(labelled))
    return [labelled[index * len(labelled) // count] for index in range(count)]


def compare(
    name: str,
    server: LlamaServer,
    reference: Reference,
    tokenizer: Any,
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> Comparison:
    """Compare the loaded file, which the chain calls `name`, with `reference`.

    `kl` is the mean, over the reference's positions, of KL(merged || file) between next-token distributions in nats:
    over the whole vocabulary up to `MAX_PROBABILITIES` tokens; over llama.cpp's likeliest that many and one event for
    all others in a larger one, which can only be smaller. `top1_agreement` is the share of positions at which both
    find the same token likeliest. `chat_prompt_match` is over a few chats, with and without thinking.
    `exact_match` is over the rows that have an answer, `same_answer_rate` over all.

    Raises: StepError: the file splits text into other tokens than the model's tokenizer.
    """
    metrics = {"tokenization_match": check_tokenization(server, tokenizer, [row.prompt for row in reference.rows])}
    metrics |= check_chats(server, tokenizer)
    positions = _compare_distributions(server, reference)
    answers = server.answers(
        reference.prompts,
        stop_texts=tokenizer.convert_ids_to_tokens(list(stop_token_ids)),
        max_new_tokens=max_new_tokens,
        on_progress=on_progress,
    )
    problems = [
        AnsweredProblem(_said(row, mine) == _said(row, theirs), _is_right(row, theirs), _is_right(row, mine))
        for row, mine, theirs in zip(reference.rows, answers, reference.answers, strict=True)
    ]
    link = chain_link(name, "merged", positions, problems)
    metrics |= {"kl": link.kl, "max_kl": max(max(one.kl for one in positions), 0.0), "top1_agreement": link.same_token}
    metrics |= {"kl_error": link.kl_error, "loss_change": link.loss_change, "perplexity": link.perplexity}
    metrics["loss_change_error"] = link.loss_change_error
    if link.same_answer is not None:
        metrics["same_answer_rate"] = link.same_answer
    if (score := exact_match(reference.rows, answers)) is not None:
        metrics["exact_match"] = score
    return Comparison(metrics, link)


def exact_match(rows: Sequence[HeldOutRow], answers: Sequence[Answer]) -> float | None:
    """Share of the rows with a known answer whose final answer is that; None if no row has one."""
    outcomes = [_is_right(row, answer) for row, answer in zip(rows, answers, strict=True)]
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else None


def _is_right(row: HeldOutRow, answer: Answer) -> bool | None:
    """Whether the final answer is the row's; None for a row without one."""
    if row.answer is None:
        return None
    return judge(row.answer, answer.text, prompt=row.prompt, finished=answer.finished).outcome == "right"


def _said(row: HeldOutRow, answer: Answer) -> str:
    """What counts as the same answer: the final answer, or the whole text where there is none."""
    return final_answer(with_opening(row.prompt, answer.text)) or answer.text.strip()


def check_tokenization(server: LlamaServer, tokenizer: Any, texts: Sequence[str]) -> float:
    """Share of `PROBES` and `texts` with equal tokens. Raises: StepError: one of `PROBES` differs."""
    special = "".join(tokenizer.all_special_tokens)
    matches = 0
    for text in (*PROBES, special, *texts):
        expected, found = tokenizer(text, add_special_tokens=False)["input_ids"], server.tokenize(text)
        if expected != found and text not in texts:
            raise StepError(
                f"gguf-quantize: llama.cpp splits {text!r} into {len(found)} tokens {found}, the model's tokenizer "
                f"into {len(expected)} {expected}: this tokenizer cannot be converted faithfully"
            )
        matches += expected == found
    return matches / (len(PROBES) + 1 + len(texts))


def check_chats(server: LlamaServer, tokenizer: Any) -> dict[str, float]:
    """Talk to the server in both thinking modes, and with a tool where the template knows tools.

    Returns: the share of probe chats of which the file's template makes, in llama.cpp, what the tokenizer's does;
        nothing for a tokenizer without one.
    Raises: StepError: the server does not answer a chat of which it makes the right prompt.
    """
    matches = []
    for thinking in (True, False):
        for chat, tools in _CHATS:
            expected = _rendered(tokenizer, chat, tools, thinking)
            if expected is None:
                continue
            try:
                found = server.chat_prompt(chat, tools, thinking=thinking).removeprefix(tokenizer.bos_token or "")
            except StepError as error:
                logger.warning("%s", error)
                found = None
            matches.append(found == expected)
            # An answer with a tool would be a call cut short, which the server cannot read.
            if matches[-1] and not tools:
                server.chat(chat, thinking=thinking, max_new_tokens=_CHAT_TOKENS)
    return {"chat_prompt_match": sum(matches) / len(matches)} if matches else {}


def chat_room(tokenizer: Any) -> int:
    """Tokens that the longest of the probe chats needs, its answer included."""
    texts = [_rendered(tokenizer, *chat, thinking) for chat in _CHATS for thinking in (True, False)]
    # One more for a first token.
    return max(len(tokenizer(text)["input_ids"]) if text else 0 for text in texts) + _CHAT_TOKENS + 1


def _rendered(tokenizer: Any, chat: Messages, tools: Tools, thinking: bool) -> str | None:
    """The tokenizer's own prompt, without a first token; None where its template does not take such a chat."""
    if tools and "tools" not in str(tokenizer.chat_template):
        return None
    try:
        text: str = tokenizer.apply_chat_template(
            list(chat), tools=list(tools) or None, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    # Templates are programs of other people, and some tokenizers have none.
    except Exception:
        return None
    return text.removeprefix(tokenizer.bos_token or "")


def _compare_distributions(server: LlamaServer, reference: Reference) -> list[Position]:
    positions = []
    for one in reference.compared:
        expected_V = one.log_probabilities
        found = server.next_token_log_probabilities(one.prompt, min(len(expected_V), MAX_PROBABILITIES))
        # A token beyond the likeliest ones is less likely than the last of them.
        log_q = found.get(one.next_token, min(found.values()))
        positions.append(
            Position(
                row=one.row,
                kl=kl_divergence(expected_V, found),
                loss_before=min(-float(expected_V[one.next_token]), _LARGEST_LOSS),
                loss=min(-log_q, _LARGEST_LOSS),
                agrees=int(expected_V.argmax()) == max(found, key=lambda token_id: found[token_id]),
            )
        )
    return positions


def kl_divergence(expected_V: torch.Tensor, found: Mapping[int, float]) -> float:
    """KL(expected || found) in nats over the tokens of `found` and, if those are not all, one event for the rest.

    Args:
        expected_V: log-probabilities, shape (V,), float64.
        found: log-probability by token id.
    """
    token_ids = list(found)
    p = expected_V[token_ids].exp()
    log_q = torch.tensor([found[token_id] for token_id in token_ids], dtype=torch.float64)
    # Zero probability where float32 underflows: the smallest number instead of an infinite divergence.
    log_q = log_q.clamp(min=-100.0)
    divergence = float((p * (expected_V[token_ids].clamp(min=-100.0) - log_q)).sum())
    if len(token_ids) < len(expected_V):
        p_rest, q_rest = max(1 - float(p.sum()), 0.0), max(1 - float(log_q.exp().sum()), 1e-9)
        divergence += p_rest * (math.log(p_rest) - math.log(q_rest)) if p_rest > 0 else 0.0
    return max(divergence, 0.0)
