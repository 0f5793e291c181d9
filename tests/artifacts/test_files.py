"""Names are spelled in `artifacts/` and nowhere else in the product."""

import ast
from collections.abc import Iterator
from pathlib import Path

import finemill
from finemill.artifacts import files

PACKAGE = Path(finemill.__file__).parent
NAMES = {value for name, value in vars(files).items() if name.isupper()}


def product_files() -> Iterator[Path]:
    """Every module but those of `artifacts/`; `rglob` does not follow the three links."""
    for folder in (PACKAGE, *(PACKAGE / name for name in ("components", "kernels", "pipelines"))):
        yield from (path for path in folder.rglob("*.py") if path.parent != PACKAGE / "artifacts")


def strings(path: Path) -> Iterator[str]:
    nodes = ast.walk(ast.parse(path.read_bytes()))
    yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_names_of_files_are_spelled_once() -> None:
    # The KFP wrappers are made from the catalogue, which takes the names from here.
    found = {path: NAMES & set(strings(path)) for path in product_files() if path.name != "component.py"}
    assert not {path: names for path, names in found.items() if names}


def test_the_label_that_is_not_learned_is_defined_once_for_the_product_and_once_for_the_kernels() -> None:
    found = [path.relative_to(PACKAGE).as_posix() for path in product_files() if "IGNORE_INDEX = " in path.read_text()]
    assert found == ["kernels/ops/packing.py"]
