"""The step `synthesize`: rows in, rows that a model made of them out."""

import json
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from finemill.artifacts.files import REJECTED_FILE
from finemill.artifacts.rows import PreparedRow, iterate_rows, read_rows_report, rows_writer
from finemill.components.synthesize.client import (
    JOURNAL_FILE,
    BudgetSpentError,
    Client,
    Journal,
    RequestFailedError,
)
from finemill.components.synthesize.config import SynthesizeConfig
from finemill.components.synthesize.report import write_report
from finemill.components.synthesize.tasks import Row, make_rows
from finemill.errors import TemporaryError, UserError
from finemill.models.endpoint import Endpoint
from finemill.rows.identity import question_key, row_id
from finemill.rows.reasons import WHOLE_ROW, DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation
from finemill.runtime.context import Checkpoints, StepContext

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1000
# So many rows wait in order behind the one whose answer takes longest.
_AHEAD = 4
_SAVE_ROWS = 200
_WRITE_ROWS = 20
SYNTHETIC_FILE = "synthetic.jsonl"
"""Every new row as it is, a line each: data-prep reads the file like any other."""
ORIGINS_FILE = "origins.jsonl"
"""The row that each new row was made of."""


class Outcome:
    """What became of the rows: numbers by reason and source, and those that failed one after the other."""

    def __init__(self) -> None:
        self.asked = 0
        self.written: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.failed_in_a_row = 0


def run(*, rows: Path, output_dir: Path, config: SynthesizeConfig, context: StepContext) -> Mapping[str, float]:
    """Ask for new rows of the training rows; held-out rows stay as they are.

    Writes the files of data-prep anew, so that chat-format takes the output in its place, and beside them
    synthetic.jsonl and origins.jsonl: each new row, and the row that it was made of. What the server has answered is
    kept as a checkpoint when the run ends early.
    Raises: UserError: no row is left, the budget is spent, the server refuses the key or the first request.
    TemporaryError: the server fails for row after row.
    """
    endpoint = Endpoint(config.url, config.model_name)
    with TemporaryDirectory(prefix="finemill-synthesize-") as scratch, ExitStack() as stack:
        journal = _journal(Path(scratch), context.checkpoints)
        client, outcome = Client(endpoint, config, journal), Outcome()
        held_out = _copy_held_out(rows, output_dir)
        files = {
            name: stack.enter_context((output_dir / name).open("w", encoding="utf-8"))
            for name in (SYNTHETIC_FILE, ORIGINS_FILE, REJECTED_FILE)
        }
        try:
            with rows_writer(output_dir, "train") as writer:
                made = _made_rows(rows, client, config, outcome, files, held_out)
                for batch in iter(lambda: list(islice(made, _WRITE_ROWS)), []):
                    writer.write([row for rows_of_one in batch for row in rows_of_one])
                    _save_often(journal, context.checkpoints)
                    context.recorder.log_progress(_progress(outcome, client, config))
        except BudgetSpentError as error:
            raise UserError(
                f"{error}: {len(journal)} replies are kept; with a larger budget the same call goes on"
            ) from None
        finally:
            _save(journal, context.checkpoints)
    reasons = sum(outcome.dropped.values(), start=Counter[str]())
    listed = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
    if not outcome.written:
        raise UserError(f"no row is made of {outcome.asked} ({listed or 'all are as they were'})")
    if reasons:
        logger.warning("nothing is made of %d of %d rows (%s)", reasons.total(), outcome.asked, listed)
    write_report(output_dir, read_rows_report(rows), config, endpoint.model, outcome.dropped, client.spent)
    context.checkpoints.keep_only(0)
    return {
        "synthesize/rows_read": outcome.asked,
        "synthesize/rows_written": outcome.written.total(),
        "synthesize/rows_dropped": reasons.total(),
        "synthesize/requests": client.spent.requests,
        "synthesize/retries": client.spent.retries,
        "synthesize/prompt_tokens": client.spent.prompt_tokens,
        "synthesize/reply_tokens": client.spent.reply_tokens,
        "synthesize/cost": client.spent.cost(config),
    }


def _journal(scratch: Path, checkpoints: Checkpoints) -> Journal:
    """The journal of an earlier run of the same call, or a new one."""
    before = checkpoints.latest()
    if before is not None:
        (scratch / JOURNAL_FILE).write_bytes((before / JOURNAL_FILE).read_bytes())
    return Journal(scratch)


def _save_often(journal: Journal, checkpoints: Checkpoints) -> None:
    if journal.unsaved >= _SAVE_ROWS:
        _save(journal, checkpoints)


def _save(journal: Journal, checkpoints: Checkpoints) -> None:
    if journal.unsaved:
        checkpoints.save(journal.folder, len(journal))
        checkpoints.keep_only(1)
        journal.unsaved = 0


def _copy_held_out(rows: Path, output_dir: Path) -> set[bytes]:
    """Copy validation and test; return the keys of their questions."""
    questions = set()
    for split in ("validation", "test"):
        with rows_writer(output_dir, split) as writer:
            for batch in iterate_rows(rows, split, batch_rows=_BATCH_ROWS):
                writer.write(batch)
                conversations = (to_conversation(json.loads(row.row), row.shape, bad_answers=True) for row in batch)
                questions |= set(map(question_key, conversations))
    return questions


def _made_rows(
    rows: Path,
    client: Client,
    config: SynthesizeConfig,
    outcome: Outcome,
    files: Mapping[str, TextIO],
    held_out: set[bytes],
) -> Iterator[list[PreparedRow]]:
    """What each training row becomes, in their order."""
    seen: set[str] = set()
    for record, result in _results(rows, client, config):
        outcome.asked += 1
        made: list[PreparedRow] = []
        try:
            made = [_prepared(record, row, held_out) for row in result.result()]
            outcome.failed_in_a_row = 0
        except DroppedRowError as reason:
            outcome.failed_in_a_row = 0
            _drop(record, str(reason), reason.field, outcome, files[REJECTED_FILE])
        except RequestFailedError as error:
            outcome.failed_in_a_row += 1
            if outcome.failed_in_a_row >= config.max_failures:
                raise TemporaryError(f"{error}; {outcome.failed_in_a_row} rows in a row") from None
            _drop(record, "request_failed", str(error), outcome, files[REJECTED_FILE])
        except UserError as error:
            if not outcome.written and not client.spent.reply_tokens:
                raise
            _drop(record, "request_refused", str(error), outcome, files[REJECTED_FILE])
        new = [row for row in made if row.id not in seen and (row.id != record.id or config.task == "judge")]
        seen.update(row.id for row in new)
        for row in new:
            outcome.written[row.source] += 1
            files[SYNTHETIC_FILE].write(row.row + "\n")
            origin = {"id": row.id, "task": config.task, "source": record.source, "row": record.number, "of": record.id}
            files[ORIGINS_FILE].write(json.dumps(origin, ensure_ascii=False) + "\n")
        yield [record, *new] if config.keep_source_rows and config.task != "judge" else new


def _results(rows: Path, client: Client, config: SynthesizeConfig) -> Iterator[tuple[PreparedRow, "Future[list[Row]]"]]:
    """Training rows with what is made of them, in order, some of them asked for ahead."""
    records = (record for batch in iterate_rows(rows, "train", batch_rows=_BATCH_ROWS) for record in batch)
    waiting: deque[tuple[PreparedRow, Future[list[Row]]]] = deque()
    with ThreadPoolExecutor(config.parallel) as pool:
        try:
            for number, record in enumerate(records):
                if config.max_rows is not None and number >= config.max_rows:
                    break
                waiting.append((record, pool.submit(_make, client, record, config)))
                if len(waiting) >= config.parallel * _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


def _make(client: Client, record: PreparedRow, config: SynthesizeConfig) -> list[Row]:
    row = json.loads(record.row)
    return make_rows(client.ask, row, to_conversation(row, record.shape), config)


def _prepared(record: PreparedRow, row: Row, held_out: set[bytes]) -> PreparedRow:
    """A new row in the place of the one that it was made of. Raises: DroppedRowError: it says nothing to learn."""
    shape = detect_shape(row) or "text"
    conversation = to_conversation(row, shape)
    try:
        identity, question = row_id(row), question_key(conversation)
    except UnicodeEncodeError:
        raise DroppedRowError("not_unicode") from None
    if question in held_out:
        raise DroppedRowError("held_out_question")
    return replace(record, id=identity, shape=shape, row=json.dumps(row, ensure_ascii=False))


def _drop(record: PreparedRow, reason: str, field: str, outcome: Outcome, rejected: TextIO) -> None:
    outcome.dropped[record.source][reason] += 1
    line: dict[str, Any] = {
        "source": record.source,
        "row": record.number,
        "reason": reason,
        "field": field or WHOLE_ROW,
    }
    rejected.write(json.dumps(line, ensure_ascii=False) + "\n")


def _progress(outcome: Outcome, client: Client, config: SynthesizeConfig) -> str:
    spent = client.spent
    tokens, cost = spent.prompt_tokens + spent.reply_tokens, spent.cost(config)
    money = f", cost {cost:.4g}" if cost else ""
    return f"{outcome.asked} rows asked, {outcome.written.total()} written, {tokens} tokens{money}"
