"""What chat-format did: dataset.json and the step's metrics."""

import hashlib
import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.dataset import SourceAmounts, SourceReport
from finemill.artifacts.metrics import metric_parts, mix_metric
from finemill.artifacts.rows import Mix, MixBy, RowsReport
from finemill.artifacts.splits import Split
from finemill.components.chat_format.example import Example
from finemill.components.chat_format.template import ChatTemplate
from finemill.components.chat_format.tokenize import ChatTokenizer

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 4


class SplitCounts:
    """What became of a split's rows: rows by source, and of every example what the report counts, in 17 bytes.

    `times` says how often the mix takes each example, shape (E,); all once until it is set.
    """

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.examples_dropped: Counter[str] = Counter()
        self.times: NDArray[np.int64] | None = None
        self._names: dict[str, int] = {}
        self._sources, self._tokens, self._learned = array("H"), array("i"), array("i")
        self._truncated, self._unrolled, self._thinking = array("b"), array("b"), array("b")
        # Most examples have the same few ends, so that each is stored once.
        self._ends = array("i")
        self._known_ends: dict[tuple[str | None, ...], int] = {}

    def add(self, example: Example) -> None:
        """Count one example."""
        worse = example.rejected
        self._sources.append(self._names.setdefault(example.draft.record.source, len(self._names)))
        self._tokens.append(len(example.labels) + (len(worse.labels) if worse else 0))
        self._learned.append(example.num_labels + (worse.num_labels if worse else 0))
        self._truncated.append(example.truncated)
        self._unrolled.append(example.draft.unrolled)
        self._thinking.append(bool(example.draft.kwargs.get("enable_thinking")))
        self.examples_dropped.update(example.draft.left_out)
        self._ends.append(self._known_ends.setdefault(tuple(example.end_tokens), len(self._known_ends)))

    def add_all(self, others: "SplitCounts") -> None:
        """Count what another has counted, after all that is counted here."""
        self.read += others.read
        for source, reasons in others.dropped.items():
            self.dropped[source] += reasons
        self.examples_dropped += others.examples_dropped
        numbers = [self._names.setdefault(name, len(self._names)) for name in others._names]
        self._sources.extend(numbers[number] for number in others._sources)
        for column in ("_tokens", "_learned", "_truncated", "_unrolled", "_thinking"):
            getattr(self, column).extend(getattr(others, column))
        known = [self._known_ends.setdefault(ends, len(self._known_ends)) for ends in others._known_ends]
        self._ends.extend(known[number] for number in others._ends)

    @property
    def names(self) -> list[str]:
        """The sources that have examples, by number."""
        return list(self._names)

    @property
    def sources(self) -> NDArray[np.int64]:
        """Number of each example's source, shape (E,)."""
        return np.array(self._sources, dtype=np.int64)

    @property
    def unrolled(self) -> NDArray[np.bool_]:
        """Whether each example is a part of a conversation, shape (E,)."""
        return np.array(self._unrolled, dtype=bool)

    def sizes(self, by: MixBy) -> NDArray[np.int64]:
        """What each example counts, shape (E,); of a preference both conversations."""
        if by == "rows":
            return np.ones(len(self._tokens), dtype=np.int64)
        return np.array(self._tokens if by == "tokens" else self._learned, dtype=np.int64)

    def _taken(self) -> NDArray[np.int64]:
        return np.ones(len(self._tokens), dtype=np.int64) if self.times is None else self.times

    @property
    def examples(self) -> int:
        """How many examples the split has."""
        return int(self._taken().sum())

    @property
    def tokens(self) -> int:
        """How many tokens they have."""
        return int(self._taken() @ self.sizes("tokens"))

    @property
    def learned(self) -> int:
        """How many of those are learned."""
        return int(self._taken() @ self.sizes("learned_tokens"))

    @property
    def truncated(self) -> int:
        """How many examples are cut."""
        return int(self._taken() @ np.array(self._truncated, dtype=np.int64))

    @property
    def thinking(self) -> int:
        """How many examples are rendered to think."""
        return int(self._taken() @ np.array(self._thinking, dtype=np.int64))

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int((self.sizes("tokens") * (self._taken() > 0)).max(initial=0))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example that is taken, as often as it is."""
        return np.repeat(self.sizes("tokens"), self._taken())

    @property
    def ends(self) -> Counter[str | None]:
        """End-of-turn tokens of the learned turns; None for turns without one."""
        ends: Counter[str | None] = Counter()
        numbers = np.bincount(np.array(self._ends), weights=self._taken(), minlength=len(self._known_ends))
        for group, number in zip(self._known_ends, numbers.astype(np.int64).tolist(), strict=True):
            for token in group if number else ():
                ends[token] += number
        return ends

    @property
    def rows_dropped(self) -> Counter[str]:
        """Rows without any example by reason."""
        return sum(self.dropped.values(), start=Counter[str]())

    def summary(self) -> dict[str, Any]:
        """The counts for dataset.json."""
        lengths = self.lengths
        median, most, longest = np.percentile(
            lengths if len(lengths) else [0], [50, 95, 100], method="nearest"
        ).tolist()
        return {
            "rows_read": self.read.total(),
            "examples": self.examples,
            "rows_dropped": dict(sorted(self.rows_dropped.items())),
            "examples_dropped": dict(sorted(self.examples_dropped.items())),
            "examples_left_out_by_mix": int((self._taken() == 0).sum()),
            "examples_repeated_by_mix": int(np.maximum(self._taken() - 1, 0).sum()),
            "examples_truncated": self.truncated,
            "examples_thinking": self.thinking,
            "tokens": self.tokens,
            "tokens_learned": self.learned,
            "tokens_per_example": {"median": median, "p95": most, "longest": longest},
            "examples_unrolled": int(self._taken() @ self.unrolled),
            "turns_without_end_token": self.ends[None],
        }

    def source_reports(self, names: Sequence[str], mix: Mix | None) -> list[SourceReport]:
        """What each source has in the split."""
        asked = mix.weights if mix else {}
        taken = self._amounts(names, self._taken())
        formatted = self._amounts(names, np.ones(len(self._tokens), dtype=np.int64))
        return [
            SourceReport(
                uri=name,
                share=round(asked[name] / sum(asked.values()), 6) if name in asked else None,
                rows_read=self.read[name],
                rows_dropped=dict(sorted(self.dropped[name].items())),
                formatted=formatted[name],
                **taken[name].model_dump(),
            )
            for name in names
        ]

    def _amounts(self, names: Sequence[str], times: NDArray[np.int64]) -> dict[str, SourceAmounts]:
        by_source: dict[str, NDArray[np.int64]] = {}
        for by in get_args(MixBy):
            sums = np.bincount(self.sources, weights=times * self.sizes(by), minlength=len(self._names))
            by_source[by] = sums.astype(np.int64)
        return {
            name: SourceAmounts(
                **{
                    key: value
                    for by, sums in by_source.items()
                    for key, value in _with_share(by, int(sums[number]) if number is not None else 0, int(sums.sum()))
                }
            )
            for name, number in ((name, self._names.get(name)) for name in names)
        }


def _with_share(by: str, amount: int, total: int) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return (by, amount), (f"{by}_share", round(amount / max(1, total), 6))


def warn_of_missing_ends(train: SplitCounts) -> None:
    """Log how many learned turns of the training rows end without a control token."""
    ends = train.ends
    if ends[None] > train.truncated:
        logger.warning(
            "train: %d of %d learned turns end without a control token, so the model may not learn to stop; set "
            "chat_template_path to a template that writes one after each answer",
            ends[None],
            ends.total(),
        )


def list_reasons(dropped: Counter[str]) -> str:
    """The commonest reasons with their counts; the rest in one number."""
    shown = dropped.most_common(_SHOWN_REASONS)
    others = dropped.total() - sum(number for _, number in shown)
    return ", ".join(f"{reason} {number}" for reason, number in [*shown, ("others", others)] if number)


def warn_of_losses(counts: Mapping[Split, SplitCounts]) -> None:
    """Log for each split what was left out or cut."""
    for split, count in counts.items():
        dropped = count.rows_dropped
        if dropped:
            reasons = list_reasons(dropped)
            logger.warning("%s: %d left out of %d rows (%s)", split, dropped.total(), count.read.total(), reasons)
        if count.examples_dropped:
            reasons = list_reasons(count.examples_dropped)
            logger.warning("%s: %d turns are not learned (%s)", split, count.examples_dropped.total(), reasons)
        if count.truncated:
            logger.warning("%s: %d of %d examples cut to max_length", split, count.truncated, count.examples)


def warn_of_mix(counts: SplitCounts, mix: Mix) -> None:
    """Log what keeping the shares costs."""
    summary = counts.summary()
    left_out, repeated = summary["examples_left_out_by_mix"], summary["examples_repeated_by_mix"]
    if left_out or repeated:
        total = left_out + summary["examples"] - repeated
        logger.warning(
            "train: %d of %d examples left out and %d repeated so that the shares by %s hold (mix_policy %s)",
            left_out,
            total,
            repeated,
            mix.by.replace("_", " "),
            mix.policy,
        )


def describe(
    counts: Mapping[Split, SplitCounts], asked: RowsReport, tokenizer: ChatTokenizer, template: ChatTemplate | None
) -> dict[str, Any]:
    """What dataset.json says."""
    ends = sum((count.ends for count in counts.values()), start=Counter[str | None]())
    sources = counts["train"].source_reports([source.uri for source in asked.sources], asked.mix)
    return {
        "tokenizer_sha256": tokenizer.digest,
        "chat_template_sha256": hashlib.sha256(template.source.encode()).hexdigest() if template else None,
        "eos_token": tokenizer.eos_token,
        "end_of_turn_tokens": {token: ends[token] for token in sorted(filter(None, ends))},
        "mix": asked.mix.model_dump() if asked.mix else None,
        "sources": [source.model_dump() for source in sources],
        "splits": {split: count.summary() for split, count in counts.items()},
    }


def report_metrics(counts: Mapping[Split, SplitCounts], asked: RowsReport) -> dict[str, float]:
    """The step's metrics."""
    train = counts["train"]
    sources = train.source_reports([source.uri for source in asked.sources], asked.mix)
    return {
        **{f"dataset/{split}_examples": count.examples for split, count in counts.items()},
        "dataset/rows_dropped": sum(count.rows_dropped.total() for count in counts.values()),
        "dataset/train_tokens": train.tokens,
        "dataset/train_tokens_learned_fraction": train.learned / train.tokens,
        "dataset/train_thinking_fraction": train.thinking / train.examples,
        "dataset/longest_example_tokens": max(count.longest for count in counts.values()),
        **{
            mix_metric(part, measure): value
            for source, part in zip(sources, metric_parts(source.uri for source in sources).values(), strict=True)
            for measure, value in source.model_dump(include={*get_args(MixBy), "share"}).items()
            if value is not None
        },
    }
