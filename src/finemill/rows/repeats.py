"""Texts that repeat one thing, as a model in a loop writes them, with a few of its repetitions."""

_WINDOW = 512
"""Characters by which a repetition is seen."""
_LONGEST_UNIT = 2048
_KEPT = 1024
"""Characters of a repetition that stay: more than any answer that is compared as one has."""


def shorter_repeats(text: str) -> str:
    """`text` with what it repeats for kilobytes, a sign or a paragraph, there a few times: no pattern is slow on it.

    The time is linear: only every 512th place is looked at.
    """
    kept, done, place = [], 0, 0
    while place + 2 * _KEPT <= len(text):
        again = text.find(text[place : place + _WINDOW], place + 1, place + _LONGEST_UNIT + _WINDOW)
        if again < 0:
            place += _WINDOW
            continue
        unit = again - place
        end = _end_of_period(text, again, unit)
        surplus = (end - place - max(_KEPT, 2 * unit)) // unit * unit
        if surplus > 0:
            kept.append(text[done : end - surplus])
            done = end
        place = max(end, place + _WINDOW)
    return "".join([*kept, text[done:]]) if kept else text


def _end_of_period(text: str, place: int, period: int) -> int:
    """Where the characters from `place` on are no longer those `period` before them, up to less than a window."""
    while place < len(text) and text[place : place + _WINDOW] == text[place - period : place - period + _WINDOW]:
        place += _WINDOW
    return min(place, len(text))
