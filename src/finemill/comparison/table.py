"""The lines of a comparison as a table, with what judge and people said of the same answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finemill.artifacts.metrics import Z95
from finemill.comparison.judge import WinRate
from finemill.comparison.summary import Line, Score

_PERCENT = ("exact_match", "cut_off", "rougeL", "chrf", "majority", "thinking_closed", "thinking_agrees")
_COLUMNS = (*_PERCENT, "tokens", "thinking_characters")


@dataclass(frozen=True)
class Opinions:
    """What others say of the answers, beside the measures: win rates of a judge and of people, a judge's scores."""

    judge: tuple[WinRate, ...] = ()
    votes: tuple[WinRate, ...] = ()
    scores: Mapping[tuple[str, str], Score] = field(default_factory=dict)

    def columns(self) -> dict[str, dict[tuple[str, str], str]]:
        """A cell by model and mode, for each column that has any."""
        found = {
            "judge score": {key: f"{one.mean:.1f} ± {Z95 * one.stderr:.1f}" for key, one in self.scores.items()},
            "judge wins": {(one.model, one.mode): _rate(one) for one in self.judge},
            "votes win": {(one.model, one.mode): _rate(one) for one in self.votes},
        }
        return {name: cells for name, cells in found.items() if cells}


@dataclass(frozen=True)
class Table:
    """Texts of a head and its rows; the first two columns are names."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cells(lines: Sequence[Line], opinions: Opinions) -> Table:
    """A line per model and mode; a measure that no line has is left out."""
    repeated = sorted({name for line in lines for name in line.scores if name.startswith("pass@")})
    names = [name for name in (*_COLUMNS[:1], *repeated, *_COLUMNS[1:]) if any(name in line.scores for line in lines)]
    said = opinions.columns()
    changed = f"{lines[0].compared} change" if any(line.change for line in lines) else None
    if changed:
        # Beside what it is a change of: at the table's end a narrow page would hide it.
        names.insert(names.index(lines[0].compared) + 1 if lines[0].compared in names else len(names), changed)
    spreads = any(line.seed_spread is not None for line in lines)
    rows = [
        (
            line.model,
            line.mode,
            *(_change(line.change) if name == changed else _cell(name, line.scores.get(name)) for name in names),
            *([_spread(line.seed_spread)] if spreads else []),
            *(column.get((line.model, line.mode), "") for column in said.values()),
        )
        for line in lines
    ]
    return Table(("model", "mode", *names, *(["spread over seeds"] if spreads else []), *said), tuple(rows))


def table(lines: Sequence[Line], opinions: Opinions) -> str:
    """The same as text, in columns."""
    found = cells(lines, opinions)
    everything = [found.head, *found.rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(found.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in everything
    )


def notes(opinions: Opinions) -> list[str]:
    """A sentence per win rate: against whom, on how many rows, how often the order decided."""
    return [_note(who, rate) for who, rates in (("judge", opinions.judge), ("votes", opinions.votes)) for rate in rates]


def _note(who: str, rate: WinRate) -> str:
    asked = f"{rate.judged} of {rate.judged + rate.missing} rows"
    if rate.rate is None or rate.stderr is None:
        return f"{who}: {rate.model}, {rate.mode}: no verdict on {asked}"
    bias = "" if rate.position_bias is None else f", {100 * rate.position_bias:.0f} % swayed by the order"
    return f"{who}: {rate.model}, {rate.mode}: wins {_rate(rate)} % against the first model, on {asked}{bias}"


def _rate(rate: WinRate) -> str:
    if rate.rate is None or rate.stderr is None:
        return ""
    return f"{100 * rate.rate:.1f} ± {100 * Z95 * rate.stderr:.1f}"


def _cell(name: str, score: Score | None) -> str:
    if score is None:
        return ""
    if name in _PERCENT or name.startswith("pass@"):
        return f"{100 * score.mean:.1f} ± {100 * Z95 * score.stderr:.1f}"
    return f"{score.mean:.0f}"


def _spread(spread: float | None) -> str:
    return "" if spread is None else f"{100 * spread:.1f}"


def _change(score: Score | None) -> str:
    return f"{100 * score.mean:+.1f} ± {100 * Z95 * score.stderr:.1f}" if score else ""
