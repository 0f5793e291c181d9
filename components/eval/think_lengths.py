"""How long each model's thinking is, as histograms over the same bins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from finemill.artifacts.evaluation import Sample
from finemill.rows.answers import THINK_CLOSE, THINK_OPEN, inside_thinking, with_opening

_MOST_BINS = 8


@dataclass(frozen=True)
class Bar:
    """Answers of one bin; `closed` and `cut` are their shares of the tallest bar."""

    rows: int
    closed: float
    cut: float


@dataclass(frozen=True)
class ModelThinking:
    """One model's histogram."""

    name: str
    rows: int
    thinking: int
    """Answers that think at all."""
    cut: int
    """Those that end inside the thinking: cut off, or ended there."""
    median: int | None
    """Characters of thinking, of the answers that think."""
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class ThinkLengths:
    """Histograms by model; a label per bin, its lower edge in characters."""

    labels: tuple[str, ...]
    models: tuple[ModelThinking, ...]


def think_lengths(samples: Mapping[str, Sequence[Sample]]) -> ThinkLengths | None:
    """None where no model thinks."""
    found = {name: [_length(sample) for sample in rows] for name, rows in samples.items()}
    longest = max((length for rows in found.values() for length, _ in rows), default=0)
    if not longest:
        return None
    width = _round_width(longest / _MOST_BINS)
    bins = longest // width + 1
    models = tuple(_histogram(name, rows, width, bins) for name, rows in found.items())
    return ThinkLengths(tuple(_label(width * place) for place in range(bins)), models)


def _histogram(name: str, lengths: Sequence[tuple[int, bool]], width: int, bins: int) -> ModelThinking:
    thinks = [(length, cut) for length, cut in lengths if length]
    counts = [[0, 0] for _ in range(bins)]
    for length, cut in thinks:
        counts[length // width][cut] += 1
    tallest = max((closed + cut for closed, cut in counts), default=0) or 1
    return ModelThinking(
        name,
        len(lengths),
        len(thinks),
        sum(cut for _, cut in thinks),
        round(median(length for length, _ in thinks)) if thinks else None,
        tuple(Bar(closed + cut, closed / tallest, cut / tallest) for closed, cut in counts),
    )


def _length(sample: Sample) -> tuple[int, bool]:
    """Characters of thinking, and whether it is cut; an empty block is none."""
    text = with_opening(sample.prompt, sample.completion)
    thought = text.rpartition(THINK_CLOSE)[0] if THINK_CLOSE in text else text if inside_thinking(text) else ""
    return len(thought.replace(THINK_OPEN, "").strip()), inside_thinking(text)


def _round_width(width: float) -> int:
    """The next of 1, 2 and 5 times a power of ten, at least ten characters."""
    step = 10
    while True:
        for factor in (1, 2, 5):
            if factor * step >= width:
                return factor * step
        step *= 10


def _label(edge: int) -> str:
    return f"{edge / 1000:g}k" if edge >= 1000 else str(edge)
