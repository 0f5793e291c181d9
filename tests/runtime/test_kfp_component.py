import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finemill.errors import UserError
from finemill.runtime import kfp_component
from finemill.runtime.catalog import SECTIONS, STEPS, Step
from finemill.runtime.kfp_component import component_folder, component_source

# As much as a wrapper can hold: more inputs than a line takes, a base model, files to show, a verdict.
PORTS = tuple(f"dataset_of_a_rather_long_name_{number}" for number in range(3))
LARGEST = Step(
    "compare-all",
    "Compare everything with everything.",
    inputs=(*PORTS, "base_model"),
    output="comparison",
    config_name="CompareAllConfig",
    image="cpu",
    shown={"page": "page.html", "table": "table.md"},
    verdict="is_better",
)


def write_ports(folder: Path, ports: tuple[str, ...]) -> None:
    described = [{"name": port, "description": f"what is called {port} " + "and more " * 12} for port in ports]
    folder.joinpath("ports.yaml").write_text(yaml.safe_dump({"inputs": described, "outputs": []}))


@pytest.mark.parametrize("name", list(STEPS))
def test_the_component_is_what_the_catalogue_and_the_ports_say(name: str) -> None:
    """`make components` writes them anew."""
    step = STEPS[name]
    assert (component_folder(step) / "component.py").read_text() == component_source(step)


def test_a_component_of_every_feature_is_formatted_and_is_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfp_component, "component_folder", lambda step: tmp_path)
    write_ports(tmp_path, (*LARGEST.inputs, *LARGEST.outputs))
    text = component_source(LARGEST)
    compile(text, "component.py", "exec")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--config", str(root / "pyproject.toml"), "-"]
    formatted = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert formatted.returncode == 0, formatted.stdout
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_port_without_a_description_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfp_component, "component_folder", lambda step: tmp_path)
    write_ports(tmp_path, LARGEST.inputs)
    with pytest.raises(UserError, match=r"ports\.yaml does not describe comparison, is_better, page, table: add"):
        component_source(LARGEST)


def test_preflight_takes_every_section() -> None:
    text = component_source(STEPS["preflight"])
    assert all(f"    {section}: dict = None,\n" in text for section in SECTIONS)
    assert {step.config_section for step in STEPS.values()} == {*SECTIONS, "preflight"}
