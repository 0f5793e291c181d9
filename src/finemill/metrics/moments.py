"""Dates and times of day, the same however they are written: `15:30` and `3:30 p.m.`, `March 5` and `5th of March`."""

import re

from finemill.rows.dates import Date, read_date
from finemill.rows.formulas import tidy

_TIME = re.compile(
    r"(?P<h>\d{1,2})(?:(?::(?P<m>\d{2})(?::(?P<s>\d{2}))?|h(?P<french>\d{2}))\s*(?P<half>[ap]\.?\s?m\.?)?|\s*(?P<whole>[ap]\.?\s?m\.?))",
    re.IGNORECASE,
)
_NAMED = {"noon": "12:00 PM", "midday": "12:00 PM", "midnight": "12:00 AM"}


def same_moment(gold: str, said: str) -> bool | None:
    """Whether two texts are the same date or time of day; None where neither is one."""
    dates = read_date(gold), read_date(said)
    if any(dates):
        return all(dates) and _same_date(*dates)
    times = _time(gold), _time(said)
    if any(times):
        return all(times) and _same_time(*times)
    return None


def _same_date(gold: Date | None, said: Date | None) -> bool:
    if gold is None or said is None or gold.year not in (None, said.year):
        return False
    if gold.swapped != said.swapped:
        # 3/5 is in March or in May.
        return False
    return (gold.month, gold.day) == (said.month, said.day)


def _time(text: str) -> re.Match[str] | None:
    plain = re.sub(r"^(?:at\s+)?(?:12(?::00)?\s+)?(?=noon|mid)", "", tidy(text), flags=re.IGNORECASE)
    plain = re.sub(r"^(\d{1,2})\s+o['\u2019]clock", r"\1:00", plain, flags=re.IGNORECASE)
    plain = re.sub(r"\s+in the morning$", " AM", plain, flags=re.IGNORECASE)
    plain = re.sub(r"\s+in the (?:afternoon|evening)$", " PM", plain, flags=re.IGNORECASE)
    return _TIME.fullmatch(_NAMED.get(plain.lower(), plain))


def _same_time(gold: re.Match[str] | None, said: re.Match[str] | None) -> bool:
    if gold is None or said is None:
        return False
    mine, theirs = _parts(gold), _parts(said)
    # A half of the day that the right answer leaves open may be named, not said by another hour: 22:00 is not 10:00.
    same_half = mine[3] == theirs[3] or (not mine[3] and int(gold["h"]) == int(said["h"]))
    return mine[:3] == theirs[:3] and same_half


def _parts(time: re.Match[str]) -> tuple[int, int, int, str]:
    """Hour, minute and second of a clock with twelve hours, and which half of the day, "" if that is left open."""
    hour, half = int(time["h"]), (time["half"] or time["whole"] or "").lower()[:1]
    if not half and (hour == 0 or hour > 12):
        half = "p" if hour > 12 else "a"
    return hour % 12, int(time["m"] or time["french"] or 0), int(time["s"] or 0), half
