"""A file in a store, and how the addresses of folders are spelled."""

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from finemill.errors import UserError


@dataclass(frozen=True)
class StoredFile:
    """A file in a store: `name` relative to what was asked for, size in bytes, when it was last written (UTC)."""

    name: str
    size: int
    modified: datetime


def normalize_uri(uri: str) -> str:
    """`file://` and an absolute path for a plain path or a file URI, anything else unchanged; no trailing slash."""
    if not uri.strip():
        raise UserError("the store's address is empty: give a folder or s3://bucket/prefix")
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        if parts.netloc:
            raise UserError(f"'{uri}': a file URI has three slashes, file:///folder; found the host '{parts.netloc}'")
        try:
            return local_path(uri).expanduser().resolve().as_uri()
        except RuntimeError:
            raise UserError(f"'{uri}': there is no such user, or no HOME: write the folder's whole path") from None
    if re.search(r"[\x00-\x1f\x7f]", uri):
        raise UserError(f"{uri!r:.200} holds a line break or another control character: correct the address")
    return uri.rstrip("/")


def local_path(uri: str) -> Path:
    """The path of a file URI, or of a plain path. Raises: UserError: it holds a NUL character."""
    if "\0" in uri or (uri.startswith("file:") and "%00" in uri):
        raise UserError(f"{uri!r:.200} holds a NUL character, which no file's name has: correct the address")
    if not uri.startswith("file:"):
        return Path(uri)
    # Nothing in a file's address is a query or a fragment: `#` and `?` are characters of its name.
    rest = uri.removeprefix("file:")
    path = f"/{rest[2:].partition('/')[2]}" if rest.startswith("//") else rest
    # As `Path.as_uri` wrote it: the bytes that the system knows the file by, whatever the locale makes of them.
    return Path(os.fsdecode(unquote_to_bytes(path)))
