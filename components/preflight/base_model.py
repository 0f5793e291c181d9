"""What can be said of a base model without fetching its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from finemill.artifacts.manifest import Reference
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import BUILTIN_MODELS, FORMS, check_model_folder
from finemill.storage.store import fetch_artifact, read_artifact


@dataclass(frozen=True)
class BaseFacts:
    """The exact model a reference stands for now, and its config.json."""

    id: str
    config: dict[str, Any]


def inspect_base_model(reference: str) -> BaseFacts:
    """Resolve a base model reference to a folder, an artifact or a hub commit.

    Raises: UserError: no such model or revision, or no right to read it. TemporaryError: the hub is out of reach.
    """
    if "@sha256:" in reference:
        return _artifact(reference)
    folder = BUILTIN_MODELS.get(reference) or Path(unquote(urlparse(reference).path)).expanduser()
    if folder.is_dir() and not reference.startswith("hf://"):
        check_model_folder(folder, reference)
        return BaseFacts(reference, _read_config(folder))
    if reference.startswith(("builtin:", "file:", "/", ".", "~")) or reference.count("/") < 1:
        raise UserError(f"base model '{reference}' not found: give {FORMS}")
    name, _, revision = reference.removeprefix("hf://").partition("@")
    return _hub(name, revision or None)


def _artifact(text: str) -> BaseFacts:
    reference = Reference.parse(text)
    manifest = read_artifact(reference)
    if manifest.kind != "model":
        raise UserError(f"base model '{text}' is an artifact of kind {manifest.kind}: give one of kind model")
    return BaseFacts(text, _read_config(fetch_artifact(reference)[0]))


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _hub(name: str, revision: str | None) -> BaseFacts:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    spelled = f"hf://{name}" + (f"@{revision}" if revision else "")
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=10).sha
        config = json.loads(Path(hf_hub_download(name, "config.json", revision=commit)).read_text(encoding="utf-8"))
    except GatedRepoError:
        raise UserError(f"base model '{spelled}' is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"base model '{spelled}': the hub repository has no revision '{revision}'") from None
    except RepositoryNotFoundError:
        raise UserError(f"base model '{spelled}' not found on the hub or private: check it or set HF_TOKEN") from None
    except (HfHubHTTPError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise TemporaryError(f"base model '{spelled}': the hub is out of reach ({line})") from None
    return BaseFacts(f"hf://{name}@{commit}", config)
