"""`finemill compare MODEL... --rows WHERE`: several models on the same questions, side by side."""

import argparse
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from finemill.artifacts.comparison import ComparedAnswer, Mode, write_answers
from finemill.artifacts.files import METRICS_FILE
from finemill.artifacts.records import write_json
from finemill.asking.find_model import FORMS, FoundModel, find_model
from finemill.asking.open_model import Preset, open_model
from finemill.commands.model_argument import add_opening_arguments, add_sampling_arguments, read_overrides
from finemill.commands.parser import CommandParser
from finemill.comparison.ask import Plan, ask
from finemill.comparison.judge import judge_all, write_verdicts
from finemill.comparison.page import write_page
from finemill.comparison.pointwise import mean_scores, score_all, write_scores
from finemill.comparison.questions import Questions, read_questions
from finemill.comparison.summary import Line, summarize, to_json
from finemill.comparison.table import Opinions, notes, table
from finemill.errors import UserError
from finemill.models.endpoint import Endpoint

_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<model>.+)")
_MODES: dict[str, tuple[Mode, ...]] = {
    "template": ("template",), "on": ("thinking",), "off": ("plain",), "both": ("thinking", "plain")
}  # fmt: skip


def execute(name: str, arguments: list[str]) -> int:
    """Ask every model, print a line for each, write what was answered. Returns: the exit code."""
    parsed = _parser(name).parse_args(arguments)
    plan = _plan(parsed)
    questions = read_questions(parsed.rows, parsed.split)
    _say_left_out(questions, parsed.rows)
    rows = questions.rows
    if parsed.max_rows:
        count = min(parsed.max_rows, len(rows))
        rows = [rows[index * len(rows) // count] for index in range(count)]
    # All are found before the first is asked, which may take an hour.
    models = _named(parsed)
    judge = Endpoint(parsed.judge, parsed.judge_name) if parsed.judge else None
    if judge and parsed.judge_mode != "pointwise" and len(models) * len(plan.modes) < 2:
        raise UserError(
            "--judge compares with the first model: name a second one, --thinking both, or --judge-mode pointwise"
        )
    answers: list[ComparedAnswer] = []
    for label, found in models.items():
        with ExitStack() as stack:
            model = stack.enter_context(
                open_model(
                    found,
                    model_name=parsed.model_name,
                    context_length=parsed.context_length,
                    load_in_4bit=parsed.load_in_4bit,
                    parallel=4,
                )
            )
            answers += ask(model, label, rows, plan, _progress)
    lines = summarize(answers)
    pairwise = judge is not None and parsed.judge_mode != "pointwise"
    pointwise = judge is not None and parsed.judge_mode != "pairwise"
    verdicts, rates = judge_all(judge, answers) if judge and pairwise else ([], [])
    scores = score_all(judge, answers) if judge and pointwise else []
    opinions = Opinions(judge=tuple(rates), scores=mean_scores(scores))
    if parsed.output:
        _write(parsed.output, answers, lines, opinions)
        if verdicts:
            write_verdicts(parsed.output, verdicts)
        if scores:
            write_scores(parsed.output, scores)
    if parsed.json:
        means = [
            {"model": model, "mode": mode, "judge_score": asdict(score)}
            for (model, mode), score in opinions.scores.items()
        ]
        print(json.dumps([*to_json(lines), *map(asdict, rates), *means], ensure_ascii=False))
    else:
        print("\n".join([table(lines, opinions), *notes(opinions)]))
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Ask several models the same questions and compare their answers. Changes are those from the first "
        "model. A row needs a question and an answer; rows with a known final answer are scored by it, others by "
        "ROUGE-L and chrF.",
        allow_abbrev=False,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help=f"NAME=MODEL or MODEL: {FORMS}")
    parser.add_argument(
        "--rows", required=True, metavar="WHERE", help="a dataset's reference or folder, or a file that data-prep reads"
    )
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test", help="of a dataset")
    parser.add_argument("--max-rows", type=int, metavar="N", help="at most this many rows, evenly spread")
    parser.add_argument(
        "--thinking",
        choices=tuple(_MODES),
        default="template",
        help="modes to ask in (default: as the template has it)",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers per question (default: 1)")
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible judge that compares with the first model")
    parser.add_argument(
        "--judge-mode",
        choices=("pairwise", "pointwise", "both"),
        default="pairwise",
        help="which of two answers is better, in both orders, or a score of 1 to 10 for each answer",
    )
    parser.add_argument("--judge-name", metavar="NAME", help="the judge's name on its server (default: its first)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write report.html, samples.parquet, metrics.json there"
    )
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantize folders' weights to NF4")
    add_opening_arguments(parser)
    add_sampling_arguments(parser, preset=None)
    return parser


def _plan(parsed: argparse.Namespace) -> Plan:
    """Greedy for one answer, drawn as the family recommends for several."""
    overrides = read_overrides(parsed)
    for option in ("samples", "max_rows"):
        value = getattr(parsed, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: allowed is 1 or more")
    preset: Preset = parsed.preset or ("recommended" if parsed.samples > 1 else "greedy")
    if parsed.samples > 1 and preset == "greedy" and not overrides.get("temperature"):
        raise UserError(
            f"--samples {parsed.samples} with the greedy choice: all would be equal; use --preset recommended"
        )
    return Plan(_MODES[parsed.thinking], parsed.samples, preset, overrides, parsed.max_new_tokens)


def _named(parsed: argparse.Namespace) -> dict[str, FoundModel]:
    models: dict[str, FoundModel] = {}
    for text in parsed.models:
        match = _NAMED.fullmatch(text)
        found = find_model(match["model"] if match else text, base_model=parsed.base_model, prefer=parsed.prefer)
        label = match["name"] if match else found.name
        if label in models:
            raise UserError(f"two models are called {label}: write NAME=MODEL")
        models[label] = found
    return models


def _say_left_out(questions: Questions, where: str) -> None:
    if questions.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in questions.left_out.most_common())
        total = questions.left_out.total() + len(questions.rows)
        print(
            f"finemill compare: {where}: {questions.left_out.total()} of {total} rows left out: {reasons}",
            file=sys.stderr,
        )


def _progress(text: str) -> None:
    print(f"finemill compare: {text}", file=sys.stderr)


def _write(folder: Path, answers: list[ComparedAnswer], lines: list[Line], opinions: Opinions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_answers(folder, answers)
    write_page(folder, answers, lines, opinions)
    write_json(folder / METRICS_FILE, to_json(lines))
