"""When a pipeline starts by itself: five cron fields and a time zone, as the engines' controllers read them.

Argo's API stores any text, and its controller then refuses it for ever: nothing runs, and nothing says so.
"""

import re
from collections.abc import Sequence
from zoneinfo import available_timezones

from finemill.errors import UserError

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_FIELDS: Sequence[tuple[str, int, int, Sequence[str]]] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
_LONGEST_MONTHS = {month: 29 if month == 2 else 30 if month in (4, 6, 9, 11) else 31 for month in range(1, 13)}


def check_schedule(cron: str | None, timezone: str | None = None) -> None:
    """Raises: UserError: the controller would refuse it, it would never fire, or there is a time zone for nothing."""
    if cron is None:
        if timezone is not None:
            raise UserError("--timezone says how --schedule is read: give both")
        return
    texts = cron.split()
    if len(texts) != len(_FIELDS):
        raise UserError(f"schedule '{cron}' has {len(texts)} fields; five are needed, '0 3 * * *' is daily at 3:00")
    fields = [_parse(text, *field) for text, field in zip(texts, _FIELDS, strict=True)]
    days, months = fields[2], fields[3]
    if texts[4][0] in "*?" and not any(day <= _LONGEST_MONTHS[month] for day in days for month in months):
        raise UserError(f"schedule '{cron}' names a day that its months do not have: it would never fire")
    if timezone is not None:
        _check_timezone(timezone)


def cron_pattern() -> str:
    """A regular expression for five fields; it does not know that a range must rise."""
    return f"^{' +'.join(_field_pattern(low, high, names) for _, low, high, names in _FIELDS)}$"


def _field_pattern(low: int, high: int, names: Sequence[str]) -> str:
    numbers = "|".join(str(number) for number in range(high, low - 1, -1))
    words = "".join(f"|{''.join(f'[{letter}{letter.lower()}]' for letter in name)}" for name in names)
    value = f"(0*({numbers}){words})"
    entry = rf"([*?]|{value}(-{value})?)(/0*[1-9][0-9]*)?"
    return f"{entry}(,{entry})*"


def _parse(text: str, name: str, low: int, high: int, names: Sequence[str]) -> set[int]:
    if not re.fullmatch(_field_pattern(low, high, names), text):
        also = f", {names[0]} to {names[-1]}" if names else ""
        raise UserError(f"schedule: '{text}' is no {name}: {low} to {high}{also}, *, ranges, steps and lists of them")
    found: set[int] = set()
    for entry in text.split(","):
        span, _, step = entry.partition("/")
        first, _, last = span.partition("-")
        start = low if first in "*?" else _number(first, low, names)
        end = _number(last, low, names) if last else high if first in "*?" or step else start
        if end < start:
            raise UserError(f"schedule: the {name}s '{span}' fall: write the smaller one first")
        found |= set(range(start, end + 1, int(step or 1)))
    return found


def _number(text: str, low: int, names: Sequence[str]) -> int:
    return int(text) if text.isdigit() else low + names.index(text.upper())


def _check_timezone(name: str) -> None:
    # A system's folder of zones holds files beside them, as `localtime` and `posix/`, that the controller has not.
    if name not in available_timezones() - {"localtime"}:
        raise UserError(f"'{name}' is no name of the time zone database: write 'Europe/Berlin' or 'UTC'")
