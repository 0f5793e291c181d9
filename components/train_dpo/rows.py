"""Pairs of a chosen and a rejected answer for the trainer, tokenized by chat-format, cut to the maximum length."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset

from finemill.artifacts.dataset import IGNORE_INDEX, LabelledRow, read_answers, read_preferences
from finemill.artifacts.splits import Split
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.errors import UserError

logger = logging.getLogger(__name__)

Pair = dict[str, list[int]]
_LEAST_SHARE = 0.74
"""Of what good answers count to what bad ones do, or the reverse, below which it is said: beyond 1 to 4/3."""


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
            "data-prep rows with prompt, chosen and rejected, or train with train-qlora; rows with one answer and a "
            "label are for loss_type kto"
        )
    if len(preferences) < num_rows:
        logger.warning("%s: %d rows without a rejected answer left out", split, num_rows - len(preferences))
    pairs = _cut_pairs(preferences, split, max_length)
    if not pairs:
        raise UserError(
            f"{split}: none of its {len(preferences)} pairs has both answers within max_length {max_length}"
        )
    return Dataset.from_list(pairs)


def _cut_pairs(preferences: Sequence[tuple[LabelledRow, LabelledRow]], split: Split, max_length: int) -> list[Pair]:
    """The pairs that have both answers within `max_length` tokens."""
    pairs = with_learned([(split_pair(*both), both) for both in preferences])
    cut = [cut_pair(pair, max_length) for pair in pairs]
    kept = [pair for pair in cut if pair["chosen_ids"] and pair["rejected_ids"]]
    if cut != pairs:
        too_long = sum(before != after for before, after in zip(pairs, cut, strict=True))
        logger.warning("%s: %d of %d pairs cut to %d tokens", split, too_long, len(pairs), max_length)
    if len(kept) < len(pairs):
        logger.warning("%s: %d pairs without one of the answers dropped", split, len(pairs) - len(kept))
    return kept


def load_answers(dataset: Path, split: Split, max_length: int, *, config: TrainDPOConfig) -> Dataset:
    """Answers by themselves, as KTO takes them, in an order that the seed decides: those that the data label as good or
    bad, and both of each pair.

    The columns are `prompt_ids`, `completion_ids`, `label`, true for good answers, and `KL_completion_ids`, an answer
    of another row of the same batch.

    Raises: UserError: the file is missing, or there are not both kinds of answers within `max_length`.
    """
    preferences, num_rows = read_preferences(dataset, split)
    labelled, _ = read_answers(dataset, split)
    if left_out := num_rows - len(preferences) - len(labelled):
        logger.warning("%s: %d rows without a label or a rejected answer left out", split, left_out)
    answers = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[name], "label": name == "chosen_ids"}
        for pair in _cut_pairs(preferences, split, max_length)
        for name in ("chosen_ids", "rejected_ids")
    ]
    answers += _cut_answers(labelled, split, max_length)
    good = sum(bool(answer["label"]) for answer in answers)
    _check_kinds(good, len(answers) - good, split, config)
    Random(config.seed).shuffle(answers)
    size = config.per_device_train_batch_size
    batches = [answers[start : start + size] for start in range(0, len(answers), size)]
    return Dataset.from_list(
        [
            {**answer, "KL_completion_ids": batch[index - 1]["completion_ids"]}
            for batch in batches
            for index, answer in enumerate(batch)
        ]
    )


def _cut_answers(labelled: Sequence[tuple[LabelledRow, bool]], split: Split, max_length: int) -> list[dict[str, Any]]:
    """The labelled answers that begin within `max_length` tokens: each the last one of its conversation."""
    answers, cut = [], 0
    for row, is_good in labelled:
        place = _last_answer(row.labels)
        completion = row.input_ids[place.start : min(place.stop, max_length)]
        cut += len(completion) < len(place)
        if completion:
            prompt = row.input_ids[: place.start]
            answers.append({"prompt_ids": prompt, "completion_ids": completion, "label": is_good})
    if cut:
        logger.warning("%s: %d of %d answers cut to %d tokens", split, cut, len(labelled), max_length)
    if len(answers) < len(labelled):
        logger.warning("%s: %d rows without an answer dropped", split, len(labelled) - len(answers))
    return answers


def _check_kinds(good: int, bad: int, split: Split, config: TrainDPOConfig) -> None:
    """Warn where one kind of answers outweighs the other. Raises: UserError: there is only one kind to train on."""
    if good and bad:
        share = config.desirable_weight * good / (config.undesirable_weight * bad)
        if split == "train" and not _LEAST_SHARE <= share <= 1 / _LEAST_SHARE:
            logger.warning(
                "%d good answers count %.2g times what %d bad ones do: KTO's authors recommend 1 to 1.33, which is "
                "undesirable_weight %.2g with this desirable_weight",
                good, share, bad, config.desirable_weight * good / bad,
            )  # fmt: skip
        return
    if not (good or bad):
        raise UserError(
            f"{split}: no row has a label or a rejected answer within max_length {config.max_length}: give data-prep "
            "rows with an answer and a label (true or false), or with chosen and rejected"
        )
    if split == "train":
        there, missing = ("good", "bad") if good else ("bad", "good")
        advice = "set labelled_bad to 'keep' in data-prep" if good else "label good ones"
        raise UserError(
            f"{split}: all {good + bad} answers are {there} ones, and loss_type '{config.loss_type}' learns from both "
            f"kinds: {advice} if the data have {missing} ones, or train with train-qlora"
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


def _last_answer(labels: Sequence[int]) -> range:
    """The last tokens in a row that are learned."""
    stop = max(position for position, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    before = (position for position in range(stop - 1, -1, -1) if labels[position] == IGNORE_INDEX)
    return range(next(before, -1) + 1, stop)


def _answer_range(labels: Sequence[int]) -> range:
    """From the first label to the last."""
    learned = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
    return range(learned[0], learned[-1] + 1)


def cut_pair(pair: Pair, max_length: int) -> Pair:
    """The pair with both conversations cut to `max_length` tokens; an answer that lies beyond is empty."""
    left = max(0, max_length - len(pair["prompt_ids"]))
    return {name: ids if name == "prompt_ids" else ids[:left] for name, ids in pair.items()}
