"""Which code wrote an artifact: a digest of what a step's function imports, and what the image or checkout says.

The digest covers the function's closure over `finemill`: every module that its files import, at the top or inside a
function, read from their syntax and never executed; the data files beside those modules (page templates, style sheets,
chat templates); and the versions of the libraries they compute with. So a mended kernel or report makes a new output,
and a comment in a module that the step never imports makes none. Nor does a release of finemill by itself: its version
is a name for the code, which the digest covers.
"""

import ast
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import finemill
from finemill.artifacts.manifest import Producer
from finemill.runtime.catalog import Step
from finemill.runtime.images import IMAGE_VARIABLE

_PACKAGE = Path(finemill.__file__).parent
_APART = (
    "finemill.artifacts.manifest",
    "finemill.artifacts.ports",
    "finemill.config",
    "finemill.credentials",
    "finemill.errors",
    "finemill.runtime",
    "finemill.storage",
    "finemill.tracking",
)
"""What checks, finds, moves and records, and decides nothing about an artifact's contents."""
_LIBRARIES_APART = frozenset({"boto3", "botocore", "filelock", "huggingface_hub", "mlflow", "pydantic"})
"""Libraries of the same kind: the output is the same whatever their version."""
_BROUGHT_ALONG = {"transformers": ("tokenizers",), "trl": ("accelerate",)}
"""Libraries that compute behind those that are imported."""
_DISTRIBUTIONS = {
    "auto_round": "auto-round",
    "cudnn": "nvidia-cudnn-frontend",
    "flash_attn": "flash-attn-4",
    "yaml": "PyYAML",
}
"""Distributions that are not called as their module."""
_DATA_SUFFIXES = frozenset({".css", ".html", ".jinja", ".js", ".json", ".jsonl", ".txt", ".yaml"})
_DESCRIPTIONS = ("metadata.yaml", "ports.yaml")
"""Names of the files that describe a step to people."""
_IMPORT_BY_NAME = re.compile(rb'\bimport_module\("([\w.]+)"\)')


def producer(step: Step) -> Producer:
    """The step's producer record; `$FINEMILL_IMAGE` and `$FINEMILL_GIT_SHA` are set in images and pods."""
    return Producer(
        step=step.name,
        version=finemill.__version__,
        code=code_digest(step),
        git_sha=os.environ.get("FINEMILL_GIT_SHA") or _checkout_sha(),
        image=os.environ.get(IMAGE_VARIABLE) or None,
    )


def code_digest(step: Step, package: Path = _PACKAGE) -> str:
    """The digest of the code behind `step` in the copy of finemill that lies in `package` (16 hex digits)."""
    folder = f"finemill.components.{step.module_name}"
    state = [step.state_name.partition(":")[0]] if step.state_name else []
    files, libraries = closure((f"{folder}.{module}" for module in ("config", "step", *state)), package)
    total = hashlib.sha256()
    for name, content in sorted(files.items()):
        total.update(f"{name} {len(content)}\n".encode() + content)
    for library in sorted(libraries):
        total.update(f"{library}=={_version(library)}\n".encode())
    return total.hexdigest()[:16]


def closure(modules: Iterable[str], package: Path = _PACKAGE) -> tuple[dict[str, bytes], set[str]]:
    """What `modules` import, directly or through others.

    Returns: the files of `finemill`, modules and their data, by path below `package`; the distributions of the
    libraries that compute.
    """
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    imported: set[str] = set()
    waiting = set(modules)
    while waiting:
        module = waiting.pop()
        seen.add(module)
        path = _source(module, package)
        if path is not None:
            files[path.relative_to(package).as_posix()] = content = path.read_bytes()
            names = _imports(content)
            imported |= names
            waiting |= {inside for name in names for inside in _modules_of(name)} - seen
    folders = {(package / name).parent for name in files}
    files |= {
        path.relative_to(package).as_posix(): path.read_bytes() for folder in folders for path in _data_files(folder)
    }
    return files, _libraries(imported)


def _modules_of(name: str) -> Iterator[str]:
    """The modules of `finemill` that an import of `name` executes and that count: itself and the packages around it.

    The outermost package holds nothing but the version.
    """
    parts = name.split(".")
    if parts[0] == "finemill":
        for length in range(2, len(parts) + 1):
            module = ".".join(parts[:length])
            if module in _APART:
                return
            yield module


def _source(module: str, package: Path) -> Path | None:
    """The file of a module of `finemill`; None for a folder without one, and for a name inside a module."""
    place = package.joinpath(*module.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def _imports(source: bytes) -> frozenset[str]:
    """Full names of all that a module imports, but for what only a type checker sees."""
    names = {name.decode() for name in _IMPORT_BY_NAME.findall(source)}
    for statement in _statements(ast.parse(source).body):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            names |= {statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)}
    return frozenset(names)


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every statement in `body`, however deep; expressions hold no imports."""
    for node in body:
        yield node
        only_types = isinstance(node, ast.If) and _is_type_checking(node.test)
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            if not (only_types and field == "body"):
                yield from _statements(getattr(node, field, ()))


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _data_files(folder: Path) -> Iterator[Path]:
    """Data beside a module, also in folders of data; a base model is an input with a digest of its own."""
    for path in folder.iterdir():
        if path.is_dir():
            if not any(path.rglob("*.py")) and not any(path.glob("*.safetensors")):
                yield from _data_files(path)
        elif path.suffix in _DATA_SUFFIXES and path.name not in _DESCRIPTIONS:
            yield path


def _libraries(imported: Iterable[str]) -> set[str]:
    modules = {name.partition(".")[0] for name in imported} - {"finemill"}
    modules |= {name for module in modules for name in _BROUGHT_ALONG.get(module, ())}
    return {_DISTRIBUTIONS.get(name, name) for name in modules - _LIBRARIES_APART - sys.stdlib_module_names}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"


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
