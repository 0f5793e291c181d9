"""Calendar dates in running text: `March 5, 2024`, `5 March`, `2024-03-05`, `5.3.2024`, `2024年3月5日`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MONTHS = ("January February March April May June July August September October November December").split()
_BY_NAME = {
    **{name.lower(): number for number, name in enumerate(_MONTHS, start=1)},
    **{name[:3].lower(): number for number, name in enumerate(_MONTHS, start=1)},
    "sept": 9,
}
# With a capital, since "may" and "march" are verbs.
_MONTH = rf"(?:{'|'.join(_MONTHS)}|(?:{'|'.join(name[:3] for name in _MONTHS)}|Sept)\b\.?)"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?(?![\d.,]*\d)"
_YEAR = r"\d{4}(?![\d.,]*\d)"
_DATE = re.compile(
    rf"""(?x)(?<![\w.,/-])(?:
    (?P<iso_year>\d{{4}})(?P<mark>[-/])(?P<iso_month>\d{{1,2}})(?P=mark)(?P<iso_day>\d{{1,2}})(?![\w/-])
    | (?P<first>\d{{1,2}})/(?P<second>\d{{1,2}})/(?P<slash_year>\d{{4}})(?![\w/-])
    | (?P<dot_day>\d{{1,2}})\.\s?(?P<dot_month>\d{{1,2}})\.\s?(?P<dot_year>\d{{4}})(?![\w/-]|[.,]\d)
    | (?P<month>{_MONTH})\s+(?P<day>\d{{1,2}}(?:st|nd|rd|th)?(?!\d))(?:,?\s+(?P<year>{_YEAR}))?
    | (?P<day_first>{_DAY})\s+(?:of\s+)?(?P<month_second>{_MONTH})(?:,?\s+(?P<year_last>{_YEAR}))?
    | (?P<month_alone>{_MONTH})\s+(?P<year_alone>{_YEAR})
    | (?:(?P<sign_year>\d{{4}})\s*年\s*)?(?P<sign_month>\d{{1,2}})\s*月\s*(?P<sign_day>\d{{1,2}})\s*[日号號]
    )"""
)


@dataclass(frozen=True)
class Date:
    """A date as far as it is said."""

    year: int | None
    month: int
    day: int | None
    swapped: bool = False
    """Whether `month` may be the day and `day` the month, as in 3/5/2024."""


def dates(text: str) -> Iterator[tuple[int, int]]:
    """Where each date of `text` begins and ends."""
    for match in _DATE.finditer(text):
        yield match.start(), match.end()


def read_date(text: str) -> Date | None:
    """The date that all of `text` is, with or without the name of its day; None for any other text."""
    text = re.sub(r"^\s*(?:on\s+)?(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day,?\s+)?(?:the\s+)?", "", text)
    match = _DATE.fullmatch(text.strip().rstrip("."))
    if not match:
        return None
    found = match.groupdict()
    if found["first"]:
        first, second = int(found["first"]), int(found["second"])
        ordered = (second, first) if first > 12 else (first, second)
        return _date(found["slash_year"], *ordered, swapped=max(first, second) <= 12 and first != second)
    name = found["month"] or found["month_second"] or found["month_alone"]
    number = found["iso_month"] or found["sign_month"] or found["dot_month"]
    month = _BY_NAME[name.rstrip(".").lower()] if name else int(number)
    day = found["iso_day"] or found["day"] or found["day_first"] or found["sign_day"] or found["dot_day"]
    years = ("iso_year", "year", "year_last", "year_alone", "sign_year", "dot_year")
    year = next((found[name] for name in years if found[name]), None)
    return _date(year, month, int(re.sub(r"\D", "", day)) if day else None)


def _date(year: str | None, month: int, day: int | None, *, swapped: bool = False) -> Date | None:
    possible = 1 <= month <= 12 and (day is None or 1 <= day <= 31)
    return Date(int(year) if year else None, month, day, swapped) if possible else None
