"""Why a row is left out."""


class DroppedRowError(Exception):
    """A row that cannot be used; the message is the reason that is counted."""
