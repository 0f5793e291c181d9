"""What a step warns of: heard at our own loggers, said once, kept for the output's manifest."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from finemill.credentials import without_credentials
from finemill.tracking.progress import Progress

_LOGGER = logging.getLogger("finemill")


class WarningLines(logging.Handler):
    """The warnings so far, a line each, in order and none twice. With `progress` each is said when it comes."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take what a logger was told."""
        self.say(record.getMessage())

    def say(self, text: str) -> None:
        """Take one warning."""
        line = without_credentials(" ".join(text.split()))
        if line not in self.lines:
            self.lines.append(line)
            if self._progress is not None:
                self._progress.emit("warning", line)


@contextmanager
def heard_warnings(progress: Progress | None) -> Iterator[WarningLines]:
    """Hear every warning of the project's loggers inside the block, whatever libraries make of the root logger.

    Without `progress` nobody says them: another process does.
    """
    heard = WarningLines(progress)
    before = _LOGGER.level, _LOGGER.propagate
    if not _LOGGER.isEnabledFor(logging.WARNING):
        _LOGGER.setLevel(logging.WARNING)
    _LOGGER.propagate = False
    _LOGGER.addHandler(heard)
    try:
        yield heard
    finally:
        _LOGGER.removeHandler(heard)
        _LOGGER.setLevel(before[0])
        _LOGGER.propagate = before[1]
