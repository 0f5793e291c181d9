"""Which code wrote an artifact: a digest of what a step's function imports, and what the image or checkout says.

The digest covers the function's closure over `finemill`: every module that its files import, at the top or inside a
function, read from their syntax and never executed; the data files beside those modules (page templates, style sheets,
chat templates); and the versions of the libraries they compute with. So a mended kernel or report makes a new output,
and a comment in a module that the step never imports makes none.
"""

import ast
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import finemill
from finemill.artifacts.manifest import Producer
from finemill.runtime.catalog import Step

_ROOT = Path(finemill.__file__).parent
_APART = ("finemill.runtime", "finemill.storage", "finemill.tracking")
"""What finds, moves and records artifacts, and decides nothing about their contents."""
_DATA_SUFFIXES = (".css", ".html", ".jinja", ".js", ".json", ".txt")
_LIBRARIES_APART = frozenset({"boto3", "botocore", "filelock", "huggingface_hub", "mlflow", "pydantic"})
"""Libraries that fetch, check and record: the output is the same whatever their version."""
_BROUGHT_ALONG = {"transformers": ("tokenizers",), "trl": ("accelerate",)}
"""Libraries that compute behind those that are imported."""
_DISTRIBUTIONS = {"cudnn": "nvidia-cudnn-frontend", "flash_attn": "flash-attn-4", "yaml": "PyYAML"}
"""Where the distribution is not called as its module."""


def producer(step: Step) -> Producer:
    """The step's producer record; `$FINEMILL_IMAGE` and `$FINEMILL_GIT_SHA` are set in the images."""
    return Producer(
        step=step.name,
        version=finemill.__version__,
        code=source_digest(step.module_name),
        git_sha=os.environ.get("FINEMILL_GIT_SHA") or _checkout_sha(),
        image=os.environ.get("FINEMILL_IMAGE") or None,
    )


@cache
def source_digest(module_name: str) -> str:
    """The digest of the code behind the step in the folder `module_name` (16 hex digits)."""
    files, libraries = closure(f"finemill.components.{module_name}.step", f"finemill.components.{module_name}.config")
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    for name, found in libraries.items():
        total.update(f"{name}=={found}\n".encode())
    return total.hexdigest()[:16]


def closure(*modules: str) -> tuple[list[Path], dict[str, str]]:
    """What `modules` import, directly or through others.

    Returns: the files of `finemill`, modules and their data, sorted; the versions of the libraries that compute.
    """
    sources: set[Path] = set()
    libraries: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is not None and path not in sources:
            sources.add(path)
            imported = list(_imports(path))
            waiting += [other for other in imported if _counts(other)]
            libraries.update(other.partition(".")[0] for other in imported)
    folders = {path.parent for path in sources}
    data = {path for folder in folders for path in _data_files(folder)}
    return sorted(sources | data), dict(sorted(_versions(libraries)))


def _counts(module: str) -> bool:
    return module.startswith("finemill.") and not any(
        module == name or module.startswith(f"{name}.") for name in _APART
    )


def _source(module: str) -> Path | None:
    """The file of a module of `finemill`; None for a name inside a module."""
    place = _ROOT.joinpath(*module.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """Full names of all that a file imports, but for what only a type checker sees."""
    names: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        waiting += ast.iter_child_nodes(node)
    return tuple(names)


def _data_files(folder: Path) -> Iterator[Path]:
    """Data beside a module, also in folders of data; a base model is an input with a digest of its own."""
    for path in folder.iterdir():
        if path.is_dir():
            if not (path / "__init__.py").is_file() and not any(path.glob("*.safetensors")):
                yield from _data_files(path)
        elif path.suffix in _DATA_SUFFIXES:
            yield path


def _versions(modules: set[str]) -> Iterator[tuple[str, str]]:
    for module in modules - _LIBRARIES_APART - sys.stdlib_module_names - {"finemill"}:
        for name in (module, *_BROUGHT_ALONG.get(module, ())):
            distribution = _DISTRIBUTIONS.get(name, name)
            try:
                yield distribution, version(distribution)
            except PackageNotFoundError:
                yield distribution, "absent"


@cache
def _checkout_sha() -> str | None:
    """The commit of the checkout that tracks this file; None for an installed wheel, wherever it lies."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
