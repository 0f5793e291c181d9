"""Pairs of a chosen and a rejected answer for the trainer, tokenized by chat-format, cut to the maximum length."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from random import Random

from datasets import Dataset

from finemill.artifacts.dataset import IGNORE_INDEX, LabelledRow, read_preferences
from finemill.artifacts.splits import Split
from finemill.errors import UserError

logger = logging.getLogger(__name__)

Pair = dict[str, list[int]]


def load_pairs(dataset: Path, split: Split, max_length: int) -> Dataset:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of the rows of a split that have a rejected answer.

    Each conversation is cut to `max_length` tokens; pairs that lose one of the answers are dropped. All counts are
    logged.

    Raises: UserError: the file is missing, or no row has a rejected answer, or none within `max_length`.
    """
    preferences, num_rows = read_preferences(dataset, split)
    if not preferences:
        raise UserError(
            f"{split}: none of its {num_rows} rows has a rejected answer, which train-dpo learns from: give "
            "data-prep rows with prompt, chosen and rejected, or train with train-qlora"
        )
    if len(preferences) < num_rows:
        logger.warning("%s: %d rows without a rejected answer left out", split, num_rows - len(preferences))
    pairs = with_learned([(split_pair(*both), both) for both in preferences])
    cut = [cut_pair(pair, max_length) for pair in pairs]
    kept = [pair for pair in cut if pair["chosen_ids"] and pair["rejected_ids"]]
    if cut != pairs:
        too_long = sum(before != after for before, after in zip(pairs, cut, strict=True))
        logger.warning("%s: %d of %d pairs cut to %d tokens", split, too_long, len(pairs), max_length)
    if len(kept) < len(pairs):
        logger.warning("%s: %d pairs without one of the answers dropped", split, len(pairs) - len(kept))
    if not kept:
        raise UserError(f"{split}: none of its {len(pairs)} pairs has both answers within max_length {max_length}")
    return Dataset.from_list(kept)


def load_answers(dataset: Path, split: Split, max_length: int, *, batch_size: int, seed: int) -> Dataset:
    """Both answers of every pair by themselves, as KTO takes them, in an order that `seed` decides.

    The columns are `prompt_ids`, `completion_ids`, `label`, true for the chosen answers, and `KL_completion_ids`, an
    answer of another row of the same batch.

    Raises: UserError: as `load_pairs`.
    """
    answers = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[name], "label": name == "chosen_ids"}
        for pair in load_pairs(dataset, split, max_length)
        for name in ("chosen_ids", "rejected_ids")
    ]
    Random(seed).shuffle(answers)
    batches = [answers[start : start + batch_size] for start in range(0, len(answers), batch_size)]
    return Dataset.from_list(
        [
            {**answer, "KL_completion_ids": batch[index - 1]["completion_ids"]}
            for batch in batches
            for index, answer in enumerate(batch)
        ]
    )


def split_pair(chosen: LabelledRow, rejected: LabelledRow) -> Pair:
    """The two conversations as one prompt and two answers, which end where the labels do.

    The prompts are the same text. Where a tokenizer joins its end with the begin of an answer, the answers begin with
    the first token that differs, as in TRL.
    """
    better, worse = _answer_range(chosen.labels), _answer_range(rejected.labels)
    prompts = zip(chosen.input_ids[: better.start], rejected.input_ids[: worse.start], strict=False)
    prompt_ids = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], prompts)]
    return {
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen.input_ids[len(prompt_ids) : better.stop],
        "rejected_ids": rejected.input_ids[len(prompt_ids) : worse.stop],
    }


def with_learned(pairs: Sequence[tuple[Pair, tuple[LabelledRow, LabelledRow]]]) -> list[Pair]:
    """Pairs with `chosen_learned` and `rejected_learned`, 0 for tokens that the model does not write, if there are any.

    Answers of several messages have such: what a tool gave back, and the headers of turns.
    """
    learned = []
    for pair, rows in pairs:
        starts = len(pair["prompt_ids"])
        masks = {
            f"{name}_learned": [int(label != IGNORE_INDEX) for label in row.labels[starts:][: len(pair[f"{name}_ids"])]]
            for name, row in zip(("chosen", "rejected"), rows, strict=True)
        }
        # The answers begin with the token that joins them with the prompt, learned or not.
        learned.append({name: [1, *mask[1:]] for name, mask in masks.items()})
    if all(all(mask) for masks in learned for mask in masks.values()):
        return [pair for pair, _ in pairs]
    return [{**pair, **masks} for (pair, _), masks in zip(pairs, learned, strict=True)]


def _answer_range(labels: Sequence[int]) -> range:
    """From the first label to the last."""
    learned = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
    return range(learned[0], learned[-1] + 1)


def cut_pair(pair: Pair, max_length: int) -> Pair:
    """The pair with both conversations cut to `max_length` tokens; an answer that lies beyond is empty."""
    left = max(0, max_length - len(pair["prompt_ids"]))
    return {name: ids if name == "prompt_ids" else ids[:left] for name, ids in pair.items()}
