"""CONTRIBUTING's example is a step: taken from the page, it runs and is known everywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLE = PAGE[PAGE.index("## Add a step") : PAGE.index("## Add a metric")]
BLOCKS = re.findall(r"^```\w+\n(.*?)^```", EXAMPLE, re.MULTILINE | re.DOTALL)
COPIED = ("src", "components", "kernels", "pipelines", "charts", "tests/runtime", "tests/pipelines", "pyproject.toml")
CATALOGUE = "src/finemill/runtime/catalog.py"
pytestmark = pytest.mark.slow


def recipe(target: str) -> str:
    """The commands of a target of the Makefile, for this interpreter and the example's checkout."""
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return re.sub(r"^\t@", "", lines, flags=re.MULTILINE).replace("$(BIN)/python", sys.executable)


def run(script: str, checkout: Path) -> "subprocess.CompletedProcess[str]":
    """Run shell commands with the checkout's own `finemill`."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout / "src"),
        "FINEMILL_CACHE": str(checkout / "cache"),
    }
    script = re.sub(r"^make (\w+)\n", lambda match: recipe(match[1]), script, flags=re.MULTILINE)
    command = ["sh", "-euc", script]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def succeed(script: str, checkout: Path) -> str:
    result = run(script, checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_step(checkout: Path) -> None:
    """Do what the page says, block by block, up to the commands that use the step."""
    for block in BLOCKS[:-1]:
        first, _, rest = block.partition("\n")
        file = re.fullmatch(r"(?:# |<!-- )(components/\S+)(?: -->)?", first)
        if file:
            (checkout / file[1]).write_text(rest)
        elif first.startswith("Step("):
            catalogue = checkout / CATALOGUE
            head, tail = catalogue.read_text().split("\n)\n\nSTEPS", 1)
            catalogue.write_text(f"{head}\n    {block.rstrip()},\n)\n\nSTEPS{tail}")
        else:
            succeed(block, checkout)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which the page was followed to the end."""
    folder = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-co", "--exclude-standard", *COPIED]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    make_step(folder)
    (folder / "said.txt").write_text(succeed(BLOCKS[-1], folder))
    return folder


def test_the_commands_of_the_page_run(checkout: Path) -> None:
    reference, _, schema = (checkout / "said.txt").read_text().partition("\n")
    uri, _, _ = reference.rpartition("@sha256:")
    counts = json.loads(Path(uri.removeprefix("file://"), "counts.json").read_text())
    assert list(counts) == ["example:reasoning"]
    assert json.loads(schema)["properties"]["split"]["description"] == "The split whose rows are counted."


def test_the_command_line_knows_the_step(checkout: Path) -> None:
    assert re.search(r"^  count-rows +Count rows\.$", succeed("finemill --help", checkout), re.MULTILINE)
    flags = succeed("finemill count-rows --help", checkout)
    assert "--rows REF" in flags
    assert "The split whose rows are counted. (default: 'train')" in flags


def test_preflight_checks_its_section(checkout: Path) -> None:
    wrong = run("""finemill preflight --config-json '{"steps": {"count_rows": {"splt": "test"}}}'""", checkout)
    assert wrong.returncode == 2
    assert "count_rows: unknown key 'splt' (allowed: split)" in wrong.stderr
    assert "    count_rows: dict = None,\n" in (checkout / "components/preflight/component.py").read_text()


def test_the_component_is_written_and_everything_has_its_form(checkout: Path) -> None:
    text = (checkout / "components/count_rows/component.py").read_text()
    assert "rows: reference of the output of data-prep." in text
    succeed(f"{sys.executable} -m pytest -q -p no:cacheprovider -k count-rows tests/runtime/test_catalog.py", checkout)
    succeed(
        f"{sys.executable} -m ruff check --no-cache . && {sys.executable} -m ruff format --no-cache --check .", checkout
    )


def test_a_task_brings_its_section_into_the_pipeline(checkout: Path) -> None:
    graph = checkout / "pipelines/finetune.py"
    text = graph.read_text()
    (task,) = re.findall(r"`(counts = task\(.*?\))`", EXAMPLE)
    text = text.replace("\nFINETUNE = ", f"{task}\n\nFINETUNE = ").replace("(plan, rows,", "(plan, rows, counts,")
    graph.write_text(text)
    succeed("make components\n", checkout)
    shown = succeed("finemill run finetune --dry-run --count-rows.split test", checkout)
    assert json.loads(shown)["count_rows"] == {"split": "test"}
    for engine in ("kfp", "argo"):
        succeed(f"finemill compile finetune --engine {engine} --store s3://bucket -o {engine}.yaml", checkout)
        assert "count-rows" in (checkout / f"{engine}.yaml").read_text()
    succeed("make chart\n", checkout)
    assert "count-rows" in (checkout / "charts/finemill/workflows/finetune.yaml").read_text()
