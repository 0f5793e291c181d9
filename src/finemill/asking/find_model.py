"""What a user means by a model: an adapter, a model folder, a GGUF file or an endpoint, found and on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

from finemill.artifacts.files import IMATRIX_FILE
from finemill.artifacts.manifest import Reference
from finemill.errors import UserError
from finemill.models.adapter import CONFIG_NAME, check_base, read_adapter_config
from finemill.models.base.resolve import BUILTIN_MODELS, resolve_base_model
from finemill.registry.snapshot import Version, read_registered_model
from finemill.storage.store import fetch_artifact, read_artifact
from finemill.tracking.settings import Tracking

FORMS = (
    "a folder, a .gguf file, an artifact reference <uri>@sha256:<digest>, hf://org/name@revision, "
    "models:/name@champion, or the address of an OpenAI-compatible server"
)
# What a registered version is asked as, the first that it has.
_PORTS = ("model", "adapter", "gguf")
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w.-]+)|/(?P<number>\d+))")
# What people run, where a folder has several.
_PREFERRED = ("Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class FoundModel:
    """One way to run a model: exactly one of `url`, `gguf` and `folder` is set.

    `folder` holds the weights, `adapter` what goes on them.
    """

    name: str
    url: str | None = None
    gguf: Path | None = None
    folder: Path | None = None
    adapter: Path | None = None


def find_model(text: str, *, base_model: str | None = None, prefer: str | None = None) -> FoundModel:
    """Find the model that `text` names.

    Args:
        base_model: of an adapter that does not name its own, or names one that is not found here.
        prefer: `model`, `adapter` or `gguf`: what of a registered version.
    Raises: UserError: it names nothing of the kind, an alias that nobody carries, an adapter of another base.
    """
    if text.startswith(("http://", "https://")):
        return FoundModel(text, url=text)
    if text.startswith("models:/"):
        reference = registered_artifact(text, prefer)
        return _artifact(text, reference, base_model)
    if "@sha256:" in text:
        return _artifact(
            text.partition("@sha256:")[0].rstrip("/").rpartition("/")[2], Reference.parse(text), base_model
        )
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return FoundModel(path.stem, gguf=path)
    if path.is_dir() and text not in BUILTIN_MODELS:
        return _folder(path.resolve().name, path, base_model)
    if not text.startswith(("hf://", "builtin:")) and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        raise UserError(f"'{text}' names no model: give {FORMS}")
    return FoundModel(text, folder=resolve_base_model(text).path)


def registered_artifact(text: str, prefer: str | None = None) -> Reference:
    """The artifact of the registered version that `text` names: its merged model, adapter or GGUF files.

    Raises: UserError: there is no such version, or it has none of them.
    """
    match = _REGISTERED.fullmatch(text)
    if match is None:
        raise UserError(f"'{text}' names no registered version: write models:/name@champion or models:/name/3")
    registry = Tracking.of_environment().registry
    model = read_registered_model(registry, match["name"])
    if model is None:
        raise UserError(f"there is no registered model '{match['name']}': MLFLOW_TRACKING_URI says which registry")
    version: Version | None
    if match["alias"]:
        version = model.by_alias(match["alias"])
        known = f"its aliases are {', '.join(sorted(model.aliases)) or 'none'}"
    else:
        version = model.versions.get(int(match["number"]))
        known = f"its versions are {', '.join(map(str, sorted(model.versions))) or 'none'}"
    if version is None:
        raise UserError(f"'{text}': registered model '{model.name}' has no such version; {known}")
    ports = (prefer,) if prefer else _PORTS
    found = next((reference for port in ports if (reference := version.artifact(port))), None)
    if found is None:
        raise UserError(f"'{text}': version {version.number} has no {' and no '.join(ports)} that finemill registered")
    return found


def _artifact(name: str, reference: Reference, base_model: str | None) -> FoundModel:
    manifest = read_artifact(reference)
    if manifest.kind not in ("adapter", "model", "gguf"):
        raise UserError(f"{reference} is an artifact of kind {manifest.kind}: give one of kind adapter, model or gguf")
    folder = fetch_artifact(reference)[0]
    return _folder(name, folder, base_model or manifest.parents.get("base_model"), dict(manifest.parents))


def _folder(name: str, folder: Path, base_model: str | None, parents: dict[str, str] | None = None) -> FoundModel:
    if (folder / CONFIG_NAME).is_file():
        base = base_model or read_adapter_config(folder).base_model_name_or_path
        if not base:
            raise UserError(f"the adapter in {folder} names no base model: give --base-model")
        resolved = resolve_base_model(base)
        check_base(folder, parents or {}, resolved)
        return FoundModel(name, folder=resolved.path, adapter=folder)
    found = (file for file in folder.glob("*.gguf") if file.name != IMATRIX_FILE)
    files = sorted(found, key=lambda file: (file.stat().st_size, file.name))
    if files and not (folder / "config.json").is_file():
        preferred = [file for kind in _PREFERRED for file in files if file.stem.endswith(kind)]
        file = [*preferred, *files][0]
        return FoundModel(file.stem, gguf=file)
    return FoundModel(name, folder=resolve_base_model(str(folder)).path)
