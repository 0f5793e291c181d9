"""Row texts that wait on disk."""

import tempfile


class Spool:
    """Row texts in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="finemill-rows-")  # noqa: SIM115 - lives as long as the spool

    def append(self, text: str) -> int:
        """Store a text without line breaks and return its offset."""
        offset = self._file.tell()
        self._file.write(text.encode() + b"\n")
        return offset

    def read(self, offset: int) -> str:
        """The text stored at `offset`. Nothing may be appended afterwards."""
        self._file.seek(offset)
        return self._file.readline()[:-1].decode()

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()
