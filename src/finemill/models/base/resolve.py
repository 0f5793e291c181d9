"""Where a base model comes from: a reference in, a checked local folder and its digest out."""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlparse

from finemill.artifacts.manifest import FileEntry, Manifest, Reference, digest_files, sha256_file
from finemill.errors import TemporaryError, UserError
from finemill.storage.base import local_path
from finemill.storage.file_digests import digest_of_files, forget_digest
from finemill.storage.store import fetch_files, read_artifact

BUILTIN_MODELS = {"builtin:tiny-qwen3": Path(__file__).parent / "tiny_qwen3"}
FORMS = "builtin:tiny-qwen3, a local folder, hf://org/name@revision, or an artifact reference <uri>@sha256:<digest>"

Part = Literal["model", "tokenizer", "config"]
_FILES: Mapping[Part, tuple[str, ...]] = {
    # Code and pickles are never fetched.
    "model": ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"),
    # With its chat template; the names are transformers' own.
    "tokenizer": (
        "tokenizer*.json",
        "*.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template*",
        "additional_chat_templates/*.jinja",
    ),
    "config": ("config.json",),
}
_ANY_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_REFERENCE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubModel(NamedTuple):
    """A model on the hub: `org/name`, and a commit, branch or tag if one is given."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision else "")


_READ_AS_JSON = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MAX_LAYERS = 2000
"""Layers of a model; the largest published ones have less than a tenth. A description of 10^9 is made for hours."""
_MAX_JSON_BYTES = 2**28
"""Bytes of a model's largest JSON file: tokenizers of a million tokens stay below a quarter of it."""


@dataclass(frozen=True)
class ResolvedBase:
    """A base model, or a part of it, on this machine.

    `id` is what an adapter records as its base: never a path of this machine unless the user gave one. `revision` is
    the hub commit, or None. `read` says whether the bytes of all `files` were read to tell their digests.
    """

    path: Path
    files: Mapping[str, FileEntry]
    id: str
    revision: str | None = None
    read: bool = True

    @property
    def digest(self) -> str:
        """The digest of the part, as of an artifact's files."""
        return digest_files(self.files)


def resolve_base_model(reference: str, part: Part = "model") -> ResolvedBase:
    """Find or download the base model that `reference` names; remembered within a process while its folder stays as is.

    Args:
        reference: one of `FORMS`; a hub reference without a revision means its newest commit.
        part: the whole, or only what a step reads: of a hub's model or an artifact nothing else is fetched.
    Raises: UserError: no such model, or a folder that is not a safe, complete model. TemporaryError: hub out of reach.
    """
    return _resolve(reference, part, _names_and_times(locate(reference)))


@cache
def _resolve(reference: str, part: Part, state: tuple[tuple[str, int], ...]) -> ResolvedBase:
    """As `resolve_base_model`, of a folder in a `state` as `_names_and_times` tells it."""
    place = locate(reference)
    if isinstance(place, HubModel):
        folder, commit = _snapshot(place, part)
        check_model_folder(folder, str(place), part)
        return _resolved(folder, part, str(HubModel(place.name, commit)), commit)
    if isinstance(place, Reference):
        files = _artifact_files(place, part)
        folder = fetch_files(place, tuple(files))
        check_model_folder(folder, reference, part)
        return ResolvedBase(folder, files, reference)
    check_model_folder(place, reference)
    return _resolved(place, part, reference)


def _names_and_times(place: Path | Reference | HubModel) -> tuple[tuple[str, int], ...]:
    """Of every file in a folder of this machine its name and when it was last changed, in nanoseconds."""
    if isinstance(place, Reference) and place.uri.startswith("file:"):
        place = local_path(place.uri)
    if not isinstance(place, Path) or not any((place / name).is_file() for name in (*_READ_AS_JSON, *_ANY_TOKENIZER)):
        return ()  # it will be refused: `/` has a million files, which come and go
    return tuple(sorted((str(path), path.lstat().st_ctime_ns) for path in place.rglob("*")))


def base_digest(reference: str, part: Part = "model") -> str:
    """The digest of a base model, or of a part: an artifact's without fetching it. Raises: as `resolve_base_model`."""
    place = locate(reference)
    if isinstance(place, Reference):
        return digest_files(_artifact_files(place, part))
    return resolve_base_model(reference, part).digest


def locate(reference: str) -> Path | Reference | HubModel:
    """What a reference names: a local folder, an artifact, or a model on the hub; whether it exists is not asked.

    Raises: UserError: it has none of the `FORMS`.
    """
    if reference in BUILTIN_MODELS:
        return BUILTIN_MODELS[reference]
    if reference.startswith("builtin:"):
        raise UserError(f"base model '{reference}' not found: built in are {', '.join(BUILTIN_MODELS)}")
    if "@sha256:" in reference:
        return Reference.parse(reference)
    if reference.startswith("file://"):
        return Path(unquote(urlparse(reference).path))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    hub = hub_name(reference)
    if hub is None:
        raise UserError(f"base model '{reference}' not found: give {FORMS}")
    return hub


def hub_name(reference: str) -> HubModel | None:
    """`org/name` and revision of a hub reference; None if it has another form."""
    match = _HUB_REFERENCE.fullmatch(reference)
    return HubModel(match[1], match[2]) if match and not reference.startswith((".", "~")) else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which never changes, and not the name of a branch or tag."""
    return bool(revision and _COMMIT_HASH.fullmatch(revision))


@contextmanager
def read_again(base: ResolvedBase) -> Iterator[None]:
    """While the block loads the model, read the files whose digests were told without: remembered, or in their names.

    Raises: TemporaryError: after the block: a digest was wrong. It is forgotten, so that the same call succeeds.
    """
    if base.read:
        yield
        return
    pool = ThreadPoolExecutor()
    try:
        digests = {name: pool.submit(sha256_file, base.path / name) for name in base.files}
        yield
        changed = [name for name, found in digests.items() if found.result() != base.files[name].sha256]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for name in changed:
        forget_digest(base.path / name)
        raise TemporaryError(
            f"base model '{base.id}': {base.path / name} has changed without another size or time, or is damaged; its "
            "digest is forgotten: run again, or, if the file is the hub's, delete it and run again"
        )


def check_model_folder(folder: Path, where: str, part: Part = "model") -> None:
    """Raises: UserError: something of `part` is missing, or could run code when loaded."""
    if not folder.is_dir():
        raise UserError(f"base model '{where}' not found: there is no such folder; give {FORMS}")
    for name in _READ_AS_JSON:
        if (folder / name).is_file():
            _read_json(folder / name, where)
    if part != "tokenizer":
        _check_config(folder / "config.json", where)
    check_model_files([path.name for path in folder.iterdir()], where, part)


def check_model_files(names: Collection[str], where: str, part: Part = "model") -> None:
    """Raises: UserError: the files of a model's folder lack weights or tokenizer of `part`, or weights are pickled."""
    if part == "model" and not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        found = f"only {', '.join(pickles)}, which can run code when loaded" if pickles else "none"
        raise UserError(f"base model '{where}' needs safetensors weights, found {found}: convert it to safetensors")
    if part != "config" and not set(_ANY_TOKENIZER) & set(names):
        raise UserError(f"base model '{where}' has no tokenizer: expected one of {', '.join(_ANY_TOKENIZER)}")


def _check_config(file: Path, where: str) -> None:
    if not file.is_file():
        raise UserError(f"base model '{where}' has no config.json: give a folder written by save_pretrained")
    config = _read_json(file, where)
    if "auto_map" in config:
        raise UserError(f"base model '{where}' brings its own code (auto_map in config.json), which is never run")
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for name in _LAYERS:
            count = part.get(name)
            if isinstance(count, int) and count > _MAX_LAYERS:
                raise UserError(f"base model '{where}': {name} is {count} in config.json, more than {_MAX_LAYERS}")


def _read_json(file: Path, where: str) -> dict[str, Any]:
    """A JSON object in a model's folder. Raises: UserError: it is none, is too large, or nested too deeply."""
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise UserError(f"base model '{where}': {file.name} has more than {_MAX_JSON_BYTES} bytes: it is no such file")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"base model '{where}': {file.name} is not JSON ({error}): fetch or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"base model '{where}': {file.name} holds no JSON object: fetch or write it again")
    return value


def _resolved(folder: Path, part: Part, spelled: str, commit: str | None = None) -> ResolvedBase:
    """The part in a folder, whatever else lies there."""
    paths = {path.name: path for pattern in _FILES[part] for path in folder.glob(pattern) if path.is_file()}
    # Large files in Hugging Face's cache are named by their sha256.
    named = {name: path.resolve().name for name, path in paths.items() if _is_named_by_digest(path)}
    others = [name for name in paths if name not in named]
    found = dict(zip(others, digest_of_files(paths[name] for name in others), strict=True))
    files = {
        name: FileEntry(size=path.stat().st_size, sha256=named.get(name) or found[name].sha256)
        for name, path in sorted(paths.items())
    }
    read = not named and not any(digest.remembered for digest in found.values())
    return ResolvedBase(folder, files, spelled, commit, read)


def _is_named_by_digest(path: Path) -> bool:
    blob = path.resolve()
    return blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) is not None


def _artifact_files(reference: Reference, part: Part) -> Mapping[str, FileEntry]:
    manifest: Manifest = read_artifact(reference)
    if manifest.kind != "model":
        raise UserError(f"base model '{reference}' is an artifact of kind {manifest.kind}: give one of kind model")
    if part == "model":
        return manifest.files
    return {
        name: entry
        for name, entry in manifest.files.items()
        if any(fnmatchcase(name, pattern) for pattern in _FILES[part])
    }


def _snapshot(model: HubModel, part: Part) -> tuple[Path, str | None]:
    """Fetch a part of one commit. The commit is in the folder's name, also when the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=list(_FILES[part])))
    except GatedRepoError:
        raise UserError(f"base model '{model}' is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"base model '{model}' not found on the hub or private: check the name or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"base model '{model}': the hub repository has no revision '{model.revision}'") from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        if offline:
            raise UserError(f"base model '{model}' is not in the local hub cache and offline mode is set") from None
        raise TemporaryError(f"base model '{model}': hub out of reach and the model is not in the cache") from None
    except HfHubHTTPError as error:
        raise TemporaryError(f"base model '{model}': hub answered {error}".splitlines()[0]) from None
    return folder, folder.name if is_commit(folder.name) else model.revision
