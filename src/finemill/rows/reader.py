"""A raw row or a turn of it as a shape reads it: which columns hold something that nobody asked for is known then."""

from collections.abc import Iterable, KeysView, Mapping
from typing import Any

from finemill.rows.values import as_text, holds_nothing, is_missing


class Reader:
    """Values by name. Of several names for one thing the first that says something counts, and only that is read."""

    def __init__(self, values: Mapping[str, Any], *, blank_counts: bool = False) -> None:
        self._values = values
        self._blank_counts = blank_counts
        self._read: set[str] = set()
        self._inside: set[str] = set()

    def get(self, *names: str) -> Any:
        """The value of the first name that says something, None if none does."""
        values = self._values
        for name in names:
            if name in values and not is_missing(values[name]):
                self._read.add(name)
                return values[name]
        return None

    @property
    def names(self) -> KeysView[str]:
        """All names, also of values that say nothing."""
        return self._values.keys()

    @property
    def values(self) -> Mapping[str, Any]:
        """All values by name; that does not count as reading."""
        return self._values

    def peek(self, name: str) -> Any:
        """The value of a name; that does not count as reading."""
        return self._values.get(name)

    def has(self, *names: str) -> bool:
        """Whether any of the names says something, or is blank with `blank_counts`; that does not count as reading."""
        values = self._values
        for name in names:
            if name in values and (
                not is_missing(values[name]) or (self._blank_counts and isinstance(values[name], str))
            ):
                return True
        return False

    def first(self, names: Iterable[str]) -> str | None:
        """The first of the names that `has` says something; that does not count as reading."""
        values = self._values
        # Rows have few names, and most of what is asked for they do not have.
        return next((name for name in names if name in values and self.has(name)), None)

    def text(self, *names: str) -> str:
        """The same as text, "" for none. Raises: DroppedRowError: it is none."""
        name = self.first(names)
        return "" if name is None else as_text(self.get(name), name)

    def note_unread(self, names: Iterable[str]) -> None:
        """Remember parts of a value that was read which nobody asked for."""
        self._inside.update(names)

    @property
    def unread(self) -> list[str]:
        """Names of what says something and was not read, in order."""
        columns = [name for name, value in self._values.items() if name not in self._read and not holds_nothing(value)]
        return [*columns, *sorted(self._inside)]
