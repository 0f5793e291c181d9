"""What chat-format did: dataset.json and the step's metrics."""

import hashlib
import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.dataset import DatasetReport, DatasetSplit, SourceAmounts, SourceReport, TokensPerExample
from finemill.artifacts.metrics import metric_parts, mix_metric
from finemill.artifacts.rows import Mix, MixBy, RowsReport
from finemill.artifacts.splits import Split
from finemill.components.chat_format.example import Example
from finemill.components.chat_format.template import ChatTemplate
from finemill.components.chat_format.tokenize import ChatTokenizer

logger = logging.getLogger(__name__)

_SHOWN_REASONS = 4
_SUMMED = 1 << 16


class SplitCounts:
    """What became of a split's rows: rows by source, and of every example what the report counts, in 21 bytes.

    `times` says how often the mix takes each example, shape (E,); all once until it is set.
    """

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.examples_dropped: Counter[str] = Counter()
        self.times: NDArray[np.int64] | None = None
        self._names: dict[str, int] = {}
        self._sources, self._tokens, self._learned = array("H"), array("i"), array("i")
        self._longer = array("i")
        self._truncated, self._unrolled, self._thinking = array("b"), array("b"), array("b")
        # Most examples have the same few ends, so that each is stored once.
        self._ends = array("i")
        self._known_ends: dict[tuple[str | None, ...], int] = {}

    def add(self, example: Example) -> None:
        """Count one example."""
        worse = example.rejected
        self._sources.append(self._names.setdefault(example.draft.record.source, len(self._names)))
        self._tokens.append(len(example.labels) + (len(worse.labels) if worse else 0))
        self._longer.append(max(len(example.labels), len(worse.labels) if worse else 0))
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
        for column in ("_tokens", "_longer", "_learned", "_truncated", "_unrolled", "_thinking"):
            getattr(self, column).extend(getattr(others, column))
        known = [self._known_ends.setdefault(ends, len(self._known_ends)) for ends in others._known_ends]
        self._ends.extend(known[number] for number in others._ends)

    @property
    def names(self) -> list[str]:
        """The sources that have examples, by number."""
        return list(self._names)

    @property
    def sources(self) -> NDArray[np.uint16]:
        """Number of each example's source, shape (E,)."""
        return np.frombuffer(self._sources, dtype=np.uint16)

    @property
    def unrolled(self) -> NDArray[np.int8]:
        """Whether each example is a part of a conversation, shape (E,)."""
        return np.frombuffer(self._unrolled, dtype=np.int8)

    def sizes(self, by: MixBy) -> NDArray[np.int32]:
        """What each example counts, shape (E,); of a preference both conversations."""
        if by == "rows":
            return np.broadcast_to(np.int32(1), len(self._tokens))
        return np.frombuffer(self._tokens if by == "tokens" else self._learned, dtype=np.int32)

    def _sums(self, values: NDArray[Any], groups: NDArray[Any], num_groups: int, *, mixed: bool = True) -> list[int]:
        """Sums of the examples' values by group, with `mixed` as often as each example is taken.

        A piece at a time, since sums of many examples at once take several times the memory of what is summed.
        """
        sums = np.zeros(num_groups, dtype=np.int64)
        for start in range(0, len(values), _SUMMED):
            part = slice(start, start + _SUMMED)
            weights = values[part] if self.times is None or not mixed else values[part] * self.times[part]
            sums += np.bincount(groups[part], weights=weights, minlength=num_groups).astype(np.int64)
        return list(sums.tolist())

    def _sum(self, values: NDArray[Any]) -> int:
        return self._sums(values, np.broadcast_to(np.int8(0), len(values)), 1)[0]

    @property
    def examples(self) -> int:
        """How many examples the split has."""
        return self._sum(self.sizes("rows"))

    @property
    def tokens(self) -> int:
        """How many tokens they have."""
        return self._sum(self.sizes("tokens"))

    @property
    def learned(self) -> int:
        """How many of those are learned."""
        return self._sum(self.sizes("learned_tokens"))

    @property
    def truncated(self) -> int:
        """How many examples are cut."""
        return self._sum(np.frombuffer(self._truncated, dtype=np.int8))

    @property
    def thinking(self) -> int:
        """How many examples are rendered to think."""
        return self._sum(np.frombuffer(self._thinking, dtype=np.int8))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max(initial=0))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example that is taken, as often as it is; of a preference those of the longer conversation."""
        tokens = np.frombuffer(self._longer, dtype=np.int32)
        return tokens if self.times is None else np.repeat(tokens, self.times)

    @property
    def ends(self) -> Counter[str | None]:
        """End-of-turn tokens of the learned turns; None for turns without one."""
        ends: Counter[str | None] = Counter()
        numbers = self._sums(self.sizes("rows"), np.frombuffer(self._ends, dtype=np.int32), len(self._known_ends))
        for group, number in zip(self._known_ends, numbers, strict=True):
            for token in group if number else ():
                ends[token] += number
        return ends

    @property
    def rows_dropped(self) -> Counter[str]:
        """Rows without any example by reason."""
        return sum(self.dropped.values(), start=Counter[str]())

    def summary(self) -> DatasetSplit:
        """The counts for dataset.json."""
        lengths = self.lengths
        median, most, longest = np.percentile(
            lengths if len(lengths) else [0], [50, 95, 100], method="nearest"
        ).tolist()
        return DatasetSplit(
            rows_read=self.read.total(),
            examples=self.examples,
            rows_dropped=dict(sorted(self.rows_dropped.items())),
            examples_dropped=dict(sorted(self.examples_dropped.items())),
            examples_left_out_by_mix=0 if self.times is None else int((self.times == 0).sum()),
            examples_repeated_by_mix=0 if self.times is None else int(np.maximum(self.times - 1, 0).sum()),
            examples_truncated=self.truncated,
            examples_thinking=self.thinking,
            tokens=self.tokens,
            tokens_learned=self.learned,
            tokens_per_example=TokensPerExample(median=median, p95=most, longest=longest),
            examples_unrolled=self._sum(self.unrolled),
            turns_without_end_token=self.ends[None],
        )

    def source_reports(self, names: Sequence[str], mix: Mix | None) -> list[SourceReport]:
        """What each source has in the split."""
        asked = mix.weights if mix else {}
        taken = self._amounts(names, mixed=True)
        formatted = self._amounts(names, mixed=False)
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

    def _amounts(self, names: Sequence[str], *, mixed: bool) -> dict[str, SourceAmounts]:
        by_source = {
            by: self._sums(self.sizes(by), self.sources, len(self._names), mixed=mixed) for by in get_args(MixBy)
        }
        return {
            name: SourceAmounts(
                **{
                    key: value
                    for by, sums in by_source.items()
                    for key, value in _with_share(by, sums[number] if number is not None else 0, sum(sums))
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
    left_out, repeated = summary.examples_left_out_by_mix, summary.examples_repeated_by_mix
    if left_out or repeated:
        total = left_out + summary.examples - repeated
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
) -> DatasetReport:
    """What dataset.json says."""
    ends = sum((count.ends for count in counts.values()), start=Counter[str | None]())
    return DatasetReport(
        tokenizer_sha256=tokenizer.digest,
        chat_template_sha256=hashlib.sha256(template.source.encode()).hexdigest() if template else None,
        eos_token=tokenizer.eos_token,
        end_of_turn_tokens={token: ends[token] for token in sorted(filter(None, ends))},
        mix=asked.mix,
        sources=counts["train"].source_reports([source.uri for source in asked.sources], asked.mix),
        splits={split: count.summary() for split, count in counts.items()},
    )


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
