"""Data files in an S3 bucket."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finemill.errors import UserError
from finemill.storage.s3 import download_object, readable_errors, s3_client, split_uri


@dataclass(frozen=True)
class S3File:
    """An object in a bucket, `size` in bytes. The ETag changes with its bytes."""

    bucket: str
    key: str
    etag: str
    size: int

    @property
    def uri(self) -> str:
        """The object's address."""
        return f"s3://{self.bucket}/{self.key}"

    def digest(self) -> str:
        """What identifies its bytes without fetching them."""
        return self.etag

    def download(self, folder: Path) -> Path:
        """The object as a file in `folder`, which keeps its name.

        Raises: TemporaryError: it is another one than was listed, or came damaged twice.
        """
        path = folder / Path(self.key).name
        download_object(self.uri, self.etag, self.size, path)
        return path


def list_s3_files(uri: str) -> Mapping[str, S3File]:
    """The objects under a URI by relative name; the name "" for an object that is the URI itself.

    Raises: UserError: nothing is there, or it may not be read.
    """
    bucket, key = split_uri(uri)
    with readable_errors(uri, "cannot be listed"):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        items = [item for page in pages for item in page.get("Contents", [])]
    found = {item["Key"]: S3File(bucket, item["Key"], item["ETag"], item["Size"]) for item in items}
    if key in found:
        return {"": found[key]}
    prefix = f"{key.rstrip('/')}/" if key else ""
    files = {name.removeprefix(prefix): file for name, file in found.items() if name.startswith(prefix)}
    if not files:
        raise UserError(f"source '{uri}' not found: the bucket has no such object or prefix; check sources[].uri")
    return files
