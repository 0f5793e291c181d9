"""People's votes on pairs of answers: blind, kept as they are given, and a win rate like a judge's."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finemill.artifacts.comparison import ComparedAnswer
from finemill.comparison.judge import Verdict, Winner, WinRate, win_rate
from finemill.errors import UserError

VOTES_FILE = "votes.jsonl"


@dataclass(frozen=True)
class Vote:
    """What a person said of one pair; a later vote on the same pair counts in place of an earlier one."""

    id: str
    model: str
    mode: str
    winner: Winner | None
    """None takes an earlier vote back."""
    left: Winner
    """Whose answer stood on the left, `first` or `other`."""
    by: str
    at: str
    """When, ISO 8601, UTC."""


_READER = TypeAdapter(Vote)


@dataclass(frozen=True)
class Pair:
    """An answer of another model and the first model's to the same question."""

    first: ComparedAnswer
    other: ComparedAnswer

    @property
    def key(self) -> tuple[str, str, str]:
        """What a vote calls it."""
        return (self.other.id, self.other.model, self.other.mode)

    @property
    def left(self) -> Winner:
        """Whose answer stands on the left: drawn once for each pair, the same each time that it is shown."""
        return "first" if hashlib.sha256("\0".join(self.key).encode()).digest()[0] % 2 else "other"


def pairs_of(answers: Sequence[ComparedAnswer]) -> list[Pair]:
    """Every other model's and mode's first sample beside the first one's, in an order that tells no model.

    Pairs of equal answers are left out: there is nothing to vote on.
    Raises: UserError: there is only one model in one mode.
    """
    groups: dict[tuple[str, str], dict[str, ComparedAnswer]] = {}
    for answer in answers:
        if answer.sample == 0:
            groups.setdefault((answer.model, answer.mode), {})[answer.id] = answer
    if len(groups) < 2:
        raise UserError("there is one model in one mode: votes compare with the first model, so ask a second one")
    (_, first), *others = groups.items()
    pairs = [Pair(first[key], other) for _, group in others for key, other in group.items() if key in first]
    differing = [pair for pair in pairs if pair.first.completion.strip() != pair.other.completion.strip()]
    return sorted(differing, key=lambda pair: hashlib.sha256("\1".join(pair.key).encode()).digest())


def read_votes(folder: Path) -> dict[tuple[str, str, str], Vote]:
    """The votes that count, by pair. Raises: UserError: a line is no vote."""
    path = folder / VOTES_FILE
    votes: dict[tuple[str, str, str], Vote] = {}
    if not path.is_file():
        return votes
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            vote = _READER.validate_json(line)
        except ValidationError:
            raise UserError(f"{path}, line {number} is no vote: remove the line, or begin a new file") from None
        key = (vote.id, vote.model, vote.mode)
        votes.pop(key, None)
        if vote.winner is not None:
            votes[key] = vote
    return votes


def add_vote(folder: Path, vote: Vote) -> None:
    """Keep a vote; a process that is killed meanwhile loses no other."""
    with (folder / VOTES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(vote), ensure_ascii=False) + "\n")


def vote_rates(pairs: Sequence[Pair], votes: Mapping[tuple[str, str, str], Vote]) -> list[WinRate]:
    """A win rate per model and mode; pairs without a vote are missing, and count for neither side."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for pair in pairs:
        vote = votes.get(pair.key)
        winner = vote.winner if vote else None
        verdict = Verdict(*pair.key, None, None, winner, "voted" if vote else "no vote")
        groups.setdefault((pair.other.model, pair.other.mode), []).append(verdict)
    return [win_rate(model, mode, verdicts) for (model, mode), verdicts in sorted(groups.items())]
