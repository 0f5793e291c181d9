"""A file in a store, and how the addresses of folders are spelled."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from finemill.errors import UserError


@dataclass(frozen=True)
class StoredFile:
    """A file in a store: `name` relative to what was asked for, size in bytes, when it was last written (UTC)."""

    name: str
    size: int
    modified: datetime


def normalize_uri(uri: str) -> str:
    """`file://` and an absolute path for a plain path or a file URI, anything else unchanged; no trailing slash."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        if parts.netloc:
            raise UserError(f"'{uri}': a file URI has three slashes, file:///folder; found the host '{parts.netloc}'")
        return local_path(uri).expanduser().resolve().as_uri()
    return uri.rstrip("/")


def local_path(uri: str) -> Path:
    """The path of a file URI, or of a plain path."""
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file:") else Path(uri)
