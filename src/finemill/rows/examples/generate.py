"""Write the example data: the same name, seed and number of rows always give the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from finemill.errors import UserError
from finemill.rows.examples.chat import chat_row
from finemill.rows.examples.preferences import preference_row
from finemill.rows.examples.reasoning import reasoning_problem

EXAMPLES: dict[str, Callable[[Random], dict[str, Any]]] = {
    "reasoning": lambda rng: reasoning_problem(rng).row(),
    "chat": chat_row,
    "preferences": preference_row,
}
_MAX_REPEATS = 1000


def write_example_data(name: str, folder: Path, seed: int, num_rows: int) -> Path:
    """Write `num_rows` different rows of `EXAMPLES[name]` to `folder/name.jsonl` and return that path.

    Raises: UserError: no example data of that name, or fewer different rows exist than were asked for.
    """
    if name not in EXAMPLES:
        raise UserError(f"example:{name} is not known: example data are {', '.join(f'example:{n}' for n in EXAMPLES)}")
    rng = Random(f"{name} {seed}")
    lines: dict[str, None] = {}
    repeats = 0
    while len(lines) < num_rows:
        line = json.dumps(EXAMPLES[name](rng), ensure_ascii=False)
        repeats = repeats + 1 if line in lines else 0
        if repeats == _MAX_REPEATS:
            raise UserError(f"example:{name} has only about {len(lines)} different rows: ask for fewer than {num_rows}")
        lines[line] = None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
