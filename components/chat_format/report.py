"""What chat-format did: dataset.json and the step's metrics."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finemill.artifacts.files import DATASET_FILE
from finemill.artifacts.records import write_json
from finemill.artifacts.splits import Split
from finemill.components.chat_format.example import Example
from finemill.components.chat_format.template import ChatTemplate
from finemill.components.chat_format.tokenize import ChatTokenizer

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 4


@dataclass
class SplitCounts:
    """What became of a split's rows."""

    read: int = 0
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    end_tokens: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    labels: int = 0
    truncated: int = 0
    thinking: int = 0
    unrolled: int = 0
    turns_without_end: int = 0

    def add(self, example: Example) -> None:
        """Count one example."""
        self.examples += 1
        self.lengths.append(len(example.input_ids))
        self.labels += example.num_labels
        self.truncated += example.truncated
        self.unrolled += example.draft.unrolled
        self.thinking += bool(example.draft.kwargs.get("enable_thinking"))
        self.turns_without_end += example.end_tokens.count(None)
        self.end_tokens.update(token for token in example.end_tokens if token is not None)

    def summary(self) -> dict[str, Any]:
        """The counts for dataset.json."""
        median, most, longest = np.percentile(self.lengths or [0], [50, 95, 100], method="nearest").tolist()
        return {
            "rows_read": self.read,
            "examples": self.examples,
            "rows_dropped": dict(sorted(self.dropped.items())),
            "examples_truncated": self.truncated,
            "examples_thinking": self.thinking,
            "tokens": sum(self.lengths),
            "tokens_learned": self.labels,
            "tokens_per_example": {"median": median, "p95": most, "longest": longest},
            "examples_unrolled": self.unrolled,
            "turns_without_end_token": self.turns_without_end,
        }


def warn_of_missing_ends(train: SplitCounts) -> None:
    """Log how many learned turns of the training rows end without a control token."""
    turns = train.end_tokens.total() + train.turns_without_end
    if train.turns_without_end > train.truncated:
        logger.warning(
            "train: %d of %d learned turns end without a control token, so the model may not learn to stop; set "
            "chat_template_path to a template that writes one after each answer",
            train.turns_without_end,
            turns,
        )


def list_reasons(dropped: Counter[str]) -> str:
    """The commonest reasons with their counts; the rest in one number."""
    shown = dropped.most_common(_SHOWN_REASONS)
    others = dropped.total() - sum(number for _, number in shown)
    return ", ".join(f"{reason} {number}" for reason, number in [*shown, ("others", others)] if number)


def warn_of_losses(counts: Mapping[Split, SplitCounts]) -> None:
    """Log for each split what was left out or cut."""
    for split, count in counts.items():
        if count.dropped:
            reasons = list_reasons(count.dropped)
            logger.warning("%s: %d left out of %d rows (%s)", split, count.dropped.total(), count.read, reasons)
        if count.truncated:
            logger.warning("%s: %d of %d examples cut to max_length", split, count.truncated, count.examples)


def write_report(
    folder: Path, counts: Mapping[Split, SplitCounts], tokenizer: ChatTokenizer, template: ChatTemplate
) -> dict[str, float]:
    """Write dataset.json; return the metrics."""
    end_tokens = sum((count.end_tokens for count in counts.values()), start=Counter[str]())
    data = {
        "tokenizer_sha256": tokenizer.digest,
        "chat_template_sha256": hashlib.sha256(template.source.encode()).hexdigest(),
        "eos_token": tokenizer.eos_token,
        "end_of_turn_tokens": dict(sorted(end_tokens.items())),
        "splits": {split: count.summary() for split, count in counts.items()},
    }
    write_json(folder / DATASET_FILE, data)
    train = counts["train"]
    return {
        **{f"dataset/{split}_examples": count.examples for split, count in counts.items()},
        "dataset/rows_dropped": sum(count.dropped.total() for count in counts.values()),
        "dataset/train_tokens": sum(train.lengths),
        "dataset/train_tokens_learned_fraction": train.labels / sum(train.lengths),
        "dataset/train_thinking_fraction": train.thinking / train.examples,
        "dataset/longest_example_tokens": max(max(count.lengths, default=0) for count in counts.values()),
    }
