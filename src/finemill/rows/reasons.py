"""Why a row is left out."""

WHOLE_ROW = "row"
"""The field of a reason that lies nowhere in particular."""


class DroppedRowError(Exception):
    """A row that cannot be used; the message is the reason that is counted, `field` where in the row it lies."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.field = field

    def within(self, field: str) -> "DroppedRowError":
        """The same reason for the field around it."""
        return DroppedRowError(str(self), f"{field}.{self.field}" if self.field else field)
