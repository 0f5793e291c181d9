"""Where a base model comes from: a reference in, a checked local folder and its digest out."""

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

from finemill.artifacts.manifest import FileEntry, Reference, digest_files, sha256_file
from finemill.errors import TemporaryError, UserError
from finemill.storage.store import fetch_artifact, read_artifact

BUILTIN_MODELS = {"builtin:tiny-qwen3": Path(__file__).parent / "tiny_qwen3"}
FORMS = "builtin:tiny-qwen3, a local folder, hf://org/name@revision, or an artifact reference <uri>@sha256:<digest>"
# What a tokenizer, a configuration and safetensors weights consist of; code and pickles are never fetched.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_HUB_REFERENCE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ResolvedBase:
    """A base model on this machine.

    `id` is what an adapter records as its base: never a path of this machine unless the user gave one. `revision` is
    the hub commit, or None. `digest` covers every file, as for artifacts.
    """

    path: Path
    digest: str
    id: str
    revision: str | None = None


@cache
def resolve_base_model(reference: str, cache_dir: Path | None = None) -> ResolvedBase:
    """Find or download the base model that `reference` names; remembered within a process.

    Args:
        reference: one of `FORMS`; a hub reference without a revision means its newest commit, which is then pinned.
        cache_dir: where hub downloads go; Hugging Face's own cache by default.
    Raises: UserError: no such model, or a folder that is not a safe, complete model. TemporaryError: hub out of reach.
    """
    if reference in BUILTIN_MODELS:
        return _local(BUILTIN_MODELS[reference], reference)
    if reference.startswith("builtin:"):
        raise UserError(f"base model '{reference}' is not known: built in are {', '.join(BUILTIN_MODELS)}")
    if "@sha256:" in reference:
        return _artifact(reference)
    if reference.startswith("file://"):
        return _local(Path(unquote(urlparse(reference).path)), reference)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return _local(folder, reference)
    match = _HUB_REFERENCE.fullmatch(reference)
    if match and not reference.startswith((".", "~")):
        return _hub(match[1], match[2], cache_dir)
    raise UserError(f"base model '{reference}' not found: give {FORMS}")


def check_model_folder(folder: Path, where: str) -> None:
    """Raises: UserError: a part of the model is missing, or it could run code when loaded."""
    if not folder.is_dir():
        raise UserError(f"base model '{where}' not found: there is no such folder; give {FORMS}")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"base model '{where}' has no config.json: give a folder written by save_pretrained")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"base model '{where}': config.json is not JSON ({error})") from None
    if "auto_map" in config:
        raise UserError(f"base model '{where}' brings its own code (auto_map in config.json), which is never run")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, which can run code when loaded" if pickles else "none"
        raise UserError(f"base model '{where}' needs safetensors weights, found {found}: convert it to safetensors")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"base model '{where}' has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")


def _local(folder: Path, reference: str) -> ResolvedBase:
    check_model_folder(folder, reference)
    return ResolvedBase(folder, _digest(folder), reference)


def _digest(folder: Path) -> str:
    """The artifact digest over the files that make up the model, whatever else lies in the folder."""
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    return digest_files({path.name: FileEntry(size=path.stat().st_size, sha256=_sha256(path)) for path in paths})


def _sha256(path: Path) -> str:
    """Large files in Hugging Face's cache are named by their sha256: hashing them in every step would cost minutes."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else sha256_file(path)


def _artifact(text: str) -> ResolvedBase:
    reference = Reference.parse(text)
    manifest = read_artifact(reference)
    if manifest.kind != "model":
        raise UserError(f"base model '{text}' is an artifact of kind {manifest.kind}: give one of kind model")
    folder = fetch_artifact(reference)[0]
    check_model_folder(folder, text)
    return ResolvedBase(folder, manifest.digest, text)


def _hub(name: str, revision: str | None, cache_dir: Path | None) -> ResolvedBase:
    """Fetch one commit. The commit is in the snapshot folder's name, also when the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    spelled = f"hf://{name}" + (f"@{revision}" if revision else "")
    try:
        folder = Path(
            snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(_MODEL_FILES))
        )
    except GatedRepoError:
        raise UserError(f"base model '{spelled}' is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"base model '{spelled}' not found on the hub or private: check the name or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"base model '{spelled}': the hub repository has no revision '{revision}'") from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        if offline:
            raise UserError(f"base model '{spelled}' is not in the local hub cache and offline mode is set") from None
        raise TemporaryError(f"base model '{spelled}': hub out of reach and the model is not in the cache") from None
    except HfHubHTTPError as error:
        raise TemporaryError(f"base model '{spelled}': hub answered {error}".splitlines()[0]) from None
    check_model_folder(folder, spelled)
    commit = folder.name if _COMMIT_HASH.fullmatch(folder.name) else revision
    return ResolvedBase(folder, _digest(folder), f"hf://{name}@{commit}", commit)
