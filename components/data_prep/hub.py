"""Data sets from the Hugging Face hub, through its own cache; works offline once they are there."""

import os
import re
from pathlib import Path

from finemill.components.data_prep.read import COMPRESSIONS, FORMATS
from finemill.errors import TemporaryError, UserError

_HUB_URI = re.compile(r"hf://datasets/(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^/]+))?(?P<path>/.*)?")


def snapshot_dataset(uri: str, name: str | None = None, split: str | None = None) -> Path:
    """The data files of `hf://datasets/org/name@revision/folder-or-file` as a local path.

    Only files whose path may belong to the configuration `name` and to `split` are downloaded.
    Raises: UserError: no such data set, revision or path. TemporaryError: the hub is out of reach.
    """
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise UserError(f"source '{uri}': write hf://datasets/org/name@revision, a folder or file may follow")
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"source '{uri}' needs huggingface_hub: pip install 'finemill[data]'") from None
    path = (match["path"] or "").strip("/")
    wanted = path + (f"*{name}/" if name else "") + (f"*{split}" if split else "")
    patterns = [f"{wanted}*{suffix}{end}" for suffix in FORMATS for end in ("", *COMPRESSIONS)]
    try:
        folder = snapshot_download(
            match["repo"], repo_type="dataset", revision=match["revision"], allow_patterns=[*patterns, path or "-"]
        )
    except hub.GatedRepoError:
        raise UserError(f"source '{uri}' is gated: accept its terms on the hub and set HF_TOKEN") from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
        raise UserError(
            f"source '{uri}': the hub has no such data set or revision, or it is private: check it, or set HF_TOKEN"
        ) from None
    except hub.LocalEntryNotFoundError:
        if os.environ.get("HF_HUB_OFFLINE"):
            raise UserError(f"source '{uri}' is not in the local hub cache and HF_HUB_OFFLINE is set") from None
        raise TemporaryError(f"source '{uri}': hub out of reach and the data set is not in its cache") from None
    except hub.HfHubHTTPError as error:
        raise TemporaryError(f"source '{uri}': hub answered {error}".splitlines()[0]) from None
    return Path(folder) / path
