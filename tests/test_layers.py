"""Imports go one way: every folder knows what it stands on, and nothing that stands on it."""

import ast
from itertools import chain
from pathlib import Path

import pytest

import finemill

PACKAGE = Path(finemill.__file__).parent
# From the ground up. A folder imports from rows above its own; folders of one row do not know each other.
LAYERS = (
    ("errors", "redaction"),
    ("config", "config_file", "credentials", "transport", "kernels.ops"),
    ("artifacts", "kernels.engine"),
    ("rows",),
    ("storage", "metrics", "kernels.planning"),
    ("tracking", "models", "kernels"),
    ("runtime", "kernels.bench"),
    ("registry", "training"),
    ("asking",),
    ("components",),
    ("comparison",),
    ("pipelines",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module by its name below `finemill`."""
    # `rglob` does not follow the links to components, kernels and pipelines.
    found = chain(
        PACKAGE.rglob("*.py"), *((PACKAGE / name).rglob("*.py") for name in ("components", "kernels", "pipelines"))
    )
    return {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in found}


MODULES = modules()


def layer(module: str) -> str:
    """The folder that a module belongs to, as `LAYERS` names it."""
    first, *rest = module.split(".")
    folder = f"{first}.{rest[0]}" if rest else first
    return folder if folder in HEIGHTS else first


def imports(path: Path) -> set[str]:
    """What a file imports of `finemill`, by name below it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.removeprefix("finemill.") for name in names if name.startswith("finemill.")}
    return {name for name in inside if name in MODULES or f"{name}.__init__" in MODULES}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_a_module_imports_only_from_below(module: str) -> None:
    own = layer(module)
    below = {name for name in HEIGHTS if HEIGHTS[name] < HEIGHTS[own]} | {own}
    assert {layer(name) for name in imports(MODULES[module])} <= below


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("components.")])
def test_steps_do_not_know_each_other(module: str) -> None:
    others = {name for name in imports(MODULES[module]) if name.startswith("components.")}
    assert {name.split(".")[1] for name in others} <= {module.split(".")[1]}


def test_every_folder_has_a_layer() -> None:
    assert {layer(name) for name in MODULES} - {"__init__"} == set(HEIGHTS)
