"""The components in the form of Kubeflow's own catalogue: metadata.yaml, OWNERS and README.md beside each."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from finemill.artifacts.ports import BASE_MODEL
from finemill.runtime.catalog import SECTIONS, STEPS

COMPONENTS = Path(__file__).parents[2] / "components"
# What kubeflow/pipelines-components accepts: these fields in this order, the optional ones anywhere, and no other.
KEYS = ["name", "stability", "dependencies", "lastVerified"]
OPTIONAL_KEYS = {"tags", "ci", "links"}
VERSION = re.compile(r"(>=|<=|==)?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
# What the harness passes, besides the step's own ports.
PLUMBING = {"store", "config", "run_id"}
every_step = pytest.mark.parametrize("name", list(STEPS))


def folder(name: str) -> Path:
    return COMPONENTS / STEPS[name].module_name


def read(name: str, file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((folder(name) / file).read_text())
    return loaded


def component(name: str) -> Any:
    module = import_module(f"finemill.components.{STEPS[name].module_name}.component")
    return getattr(module, STEPS[name].module_name)


@every_step
def test_what_a_step_s_line_names_is_in_its_folder(name: str) -> None:
    step = STEPS[name]
    assert issubclass(step.config, step.section_class)
    assert step.state is None or callable(step.state)
    # Read, not imported: torch takes seconds.
    body = ast.parse((folder(name) / "step.py").read_text()).body
    (function,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == "run")
    taken = {argument.arg for argument in function.args.kwonlyargs}
    assert taken == {"output_dir", "config", "context", *(step.inputs if step.fetches_inputs else ())}


@every_step
def test_a_shared_section_is_of_the_same_class_as_its_own(name: str) -> None:
    step = STEPS[name]
    assert step.section is None or SECTIONS[step.section].config is step.config


@every_step
def test_metadata_has_the_catalogue_s_keys(name: str) -> None:
    found = read(name, "metadata.yaml")
    assert found["name"] == name
    assert [key for key in found if key not in OPTIONAL_KEYS] == KEYS
    assert found["stability"] in ("experimental", "alpha", "beta", "stable")
    assert all(re.fullmatch(r"[a-z0-9_]+", tag) for tag in found["tags"])
    assert found["lastVerified"].year >= 2026
    assert set(found.get("ci", {})) <= {"skip_dependency_probe"}
    assert {"kubeflow"} <= set(found["dependencies"]) <= {"kubeflow", "external_services"}
    pipelines = {item["name"]: item["version"] for item in found["dependencies"]["kubeflow"]}
    assert "Pipelines" in pipelines
    services = found["dependencies"].get("external_services", [])
    for version in [*pipelines.values(), *(item["version"] for item in services)]:
        assert VERSION.fullmatch(version), version


@every_step
def test_ports_match_the_table_of_steps(name: str) -> None:
    found, step = read(name, "ports.yaml"), STEPS[name]
    assert set(found) == {"inputs", "outputs"}
    assert [item["name"] for item in found["inputs"]] == list(step.inputs)
    assert [item["name"] for item in found["outputs"]] == list(step.outputs)
    assert all(item["description"] for item in found["inputs"] + found["outputs"])


@every_step
def test_the_component_s_signature_matches_the_table_of_steps(name: str) -> None:
    step, spec = STEPS[name], component(name).component_spec
    extra = {*SECTIONS, BASE_MODEL} if step.checks_sections else set()
    assert set(spec.inputs) == {*step.inputs, *PLUMBING, *extra}
    verdict = {"Output"} if step.verdict else set()
    assert {step.output, *step.shown, "manifest", "metrics"} | verdict == set(spec.outputs)
    required = {key for key, value in spec.inputs.items() if not value.optional}
    assert required == set(step.inputs) | {"store"}
    assert all(spec.inputs[key].description for key in spec.inputs)
    assert spec.description


@every_step
def test_the_component_installs_nothing_and_imports_nothing_at_module_level_but_kfp(name: str) -> None:
    text = (folder(name) / "component.py").read_text()
    assert "packages_to_install" not in text
    assert "install_kfp_package=False" in text
    allowed = set(sys.stdlib_module_names) | {"kfp", "finemill.runtime.images"}
    for node in ast.parse(text).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert set(names) <= allowed


@every_step
def test_owners_are_named(name: str) -> None:
    owners = yaml.safe_load((folder(name) / "OWNERS").read_text())
    assert owners["approvers"]


@every_step
def test_the_readme_fits_a_screen_and_is_about_this_step(name: str) -> None:
    lines = (folder(name) / "README.md").read_text().splitlines()
    assert lines[0] == f"# {name}"
    assert 5 <= len(lines) <= 60


@every_step
def test_each_component_compiles_alone_into_anybody_s_pipeline(name: str, tmp_path: Path) -> None:
    from kfp import compiler, dsl

    call = component(name)
    ports = {key: f"s3://bucket/{key}@sha256:{'0' * 64}" for key in STEPS[name].inputs}

    @dsl.pipeline(name="mine")
    def mine() -> None:
        call(store="s3://bucket", **ports)

    compiler.Compiler().compile(mine, str(tmp_path / "mine.yaml"))
    (executor,) = yaml.safe_load((tmp_path / "mine.yaml").read_text())["deploymentSpec"]["executors"].values()
    assert executor["container"]["command"][0] == "sh"
    assert "pip install" not in " ".join(executor["container"]["command"])
