"""report.html of a comparison: the table, and every question with all models' answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from finemill.artifacts.comparison import ComparedAnswer
from finemill.artifacts.files import REPORT_PAGE
from finemill.comparison.summary import Line
from finemill.comparison.table import Opinions, cells, notes
from finemill.components.eval import report

_ORDER = {"differ": 0, "wrong": 1, "unscored": 2, "right": 3}


@dataclass(frozen=True)
class QuestionCard:
    """A question and its answers; `change` says whether the models agree: `right`, `wrong`, `differ`, `unscored`."""

    id: str
    source: str
    question: str
    reference: str
    answer: str | None
    change: str
    answers: tuple[tuple[str, ComparedAnswer], ...]


def write_page(folder: Path, answers: Sequence[ComparedAnswer], lines: Sequence[Line], opinions: Opinions) -> None:
    """Write the page: questions that the models answer differently come first."""
    questions = cards(answers)
    # The look of eval's report, and its filters.
    folders = [Path(__file__).parent, Path(report.__file__).parent]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("page.html.jinja").render(
        table=cells(lines, opinions),
        notes=notes(opinions),
        cards=questions,
        sources=sorted({card.source for card in questions}),
    )
    (folder / REPORT_PAGE).write_text(page, encoding="utf-8")


def cards(answers: Sequence[ComparedAnswer]) -> list[QuestionCard]:
    """A card per question, by how much the models differ, then in the order that they were asked in."""
    by_id: dict[str, list[ComparedAnswer]] = {}
    for answer in answers:
        by_id.setdefault(answer.id, []).append(answer)
    several_modes = len({answer.mode for answer in answers}) > 1
    several_samples = any(answer.sample for answer in answers)
    found = []
    for group in by_id.values():
        one = group[0]
        named = tuple((_name(answer, several_modes, several_samples), answer) for answer in group)
        found.append(QuestionCard(one.id, one.source, one.question, one.reference, one.answer, _change(group), named))
    return sorted(found, key=lambda card: _ORDER[card.change])


def _name(answer: ComparedAnswer, several_modes: bool, several_samples: bool) -> str:
    mode = f", {answer.mode}" if several_modes else ""
    return f"{answer.model}{mode}" + (f", sample {answer.sample + 1}" if several_samples else "")


def _change(group: Sequence[ComparedAnswer]) -> str:
    found: Mapping[bool, str] = {True: "right", False: "wrong"}
    values = {answer.exact_match for answer in group if answer.exact_match is not None}
    if not values:
        return "unscored"
    return "differ" if len(values) > 1 else found[values.pop()]
