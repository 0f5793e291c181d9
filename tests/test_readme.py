"""The README says what is true: its commands run, its configs load, its picture is the pipeline."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from finemill.pipelines.finetune import FINETUNE
from finemill.pipelines.graph import Task
from finemill.pipelines.local import for_this_machine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run_script(script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    for text in blocks("yaml"):
        name = text.splitlines()[0].removeprefix("# ")
        (folder / name).write_text(text)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FINEMILL_CACHE": str(folder / "cache"),
    }
    command = ["sh", "-euc", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def scripts_with(text: str) -> str:
    (found,) = [block for block in blocks("sh") if text in block]
    return found


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_yaml_block_names_its_file_and_parses() -> None:
    for text in blocks("yaml"):
        assert re.match(r"# \S+\.yaml\n", text)
        assert isinstance(yaml.safe_load(text), dict)


def test_the_tree_names_every_folder() -> None:
    (text,) = blocks("text")
    named, parent = set(), ""
    for line in text.splitlines():
        name = line.split("/")[0]
        parent, place = ("", name.strip()) if not name.startswith(" ") else (parent, f"{parent}/{name.strip()}")
        parent = parent or place
        assert line.split("/", 1)[1].strip(), f"{place} has no clause"
        named.add(place if not parent.startswith("src") or place != "src" else "src/finemill")
    folders = {"components", "pipelines", "kernels", "src/finemill", "images", "charts", "docs", "tests"}
    folders |= {f"kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if (path / "__init__.py").is_file()}
    library = ROOT / "src" / "finemill"
    folders |= {f"src/{path.name}" for path in library.iterdir() if (path / "__init__.py").is_file()}
    assert named == folders


def test_own_data_and_model_commands_are_valid(tmp_path: Path) -> None:
    lines = [line.split("#")[0].strip() for line in scripts_with("my.yaml").splitlines()]
    script = "\n".join(line if "--dry-run" in line else f"{line} --dry-run" for line in lines)
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("hf://Qwen/Qwen3-0.6B") == len(lines)


@pytest.mark.slow
def test_steps_one_by_one(tmp_path: Path) -> None:
    result = run_script(scripts_with("MODEL=$(") + '\necho "$MODEL"', tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"file://\S+/finemill-store/merge/\S+@sha256:[0-9a-f]{64}\n", result.stdout)


def test_pipelines_compile_as_shown(tmp_path: Path) -> None:
    result = run_script(scripts_with("finemill compile"), tmp_path)
    assert result.returncode == 0, result.stderr
    for name in result.stdout.split():
        assert list(yaml.safe_load_all((tmp_path / name).read_text()))


def test_picture_is_the_pipeline() -> None:
    (picture,) = blocks("mermaid")
    chains = [re.split(r"\s*-->\s*", line.strip()) for line in picture.splitlines() if "-->" in line]
    drawn = {edge for chain in chains for edge in pairwise(chain)}
    tasks = for_this_machine(FINETUNE).tasks
    assert drawn == {
        (source.name, task.name) for task in tasks for source in task.inputs.values() if isinstance(source, Task)
    }


def test_steps_table_lists_every_step_with_its_output() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| `(\w+)` \| .* \|$", README, re.MULTILINE)
    assert rows == [(task.name, task.step.output) for task in for_this_machine(FINETUNE).tasks]
