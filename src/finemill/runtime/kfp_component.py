"""The source of each step's KFP component, `component.py`, from the catalogue and the step's `ports.yaml`.

KFP ships a component's function as source text, so that the wrappers are files. `make components` writes them anew.
"""

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

import finemill
from finemill.artifacts.ports import BASE_MODEL
from finemill.errors import UserError
from finemill.runtime.catalog import SECTIONS, STEPS, Step

LINE_LENGTH = 120
_ARTIFACT_CLASSES = {".html": "HTML", ".md": "Markdown"}
_TEMPLATE = '''\
"""The KFP component `{{ step.name }}`; `make components` writes it from the catalogue and ports.yaml."""

from kfp import dsl

from finemill.runtime.images import IMAGES


@dsl.component(base_image=IMAGES["{{ step.image }}"], install_kfp_package=False)
def {{ step.module_name }}(
    store: str,
{% for port in step.inputs %}
    {{ port }}: str,
{% endfor %}
    {{ step.output }}: dsl.OutputPath(str),
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
{% for port, class in shown.items() %}
    {{ port }}: dsl.Output[dsl.{{ class }}],
{% endfor %}
{% if sections %}
    base_model: str = "",
{% endif %}
{% for section in sections %}
    {{ section }}: dict = None,
{% endfor %}
    config: dict = {},
    run_id: str = "",
){% if step.verdict %} -> bool{% endif %}:
    """{{ step.summary }}

    Args:
        store: folder or s3://bucket/prefix that gets the output.
{% for port in step.inputs %}
{{ entry(port, ports[port]) }}
{% endfor %}
{{ entry(step.output, "gets the reference, <uri>@sha256:<digest>, of " ~ ports[step.output]) }}
        manifest: gets the output's manifest: files, digests, parents, resolved configuration.
        metrics: gets the step's metrics.
{% for port in shown %}
{{ entry(port, "gets " ~ ports[port]) }}
{% endfor %}
{% if sections %}
        base_model: the run's base model, checked: hf://org/name@revision, or the reference of a merged model.
{% endif %}
{% for section, reader in sections.items() %}
        {{ section }}: fields as in `finemill schema {{ reader.name }}`, checked.
{% endfor %}
        config: fields as in `finemill schema {{ step.name }}`; the rest keep their defaults.
        run_id: groups the steps of one pipeline run in MLflow.
{% if step.verdict %}
{{ entry("Returns", ports[step.verdict], 4) }}
{% endif %}
    """
    from finemill.runtime.kfp_task import run_kfp_task

{% if sections %}
    sections = {
{% for section in sections %}
        "{{ section }}": {{ section }},
{% endfor %}
    }
{% endif %}
    {% if step.verdict %}return {% endif %}run_kfp_task(
        "{{ step.name }}",
        store=store,
        inputs={{ inputs }},
{% if sections %}
        config={
            **config,
            "base_model": base_model or None,
            "steps": {name: values for name, values in sections.items() if values is not None},
        },
{% else %}
        config=config,
{% endif %}
        run_id=run_id,
        reference_path={{ step.output }},
        manifest=manifest,
        metrics=metrics,
{% if shown %}
        shown={{ shown_files }},
{% endif %}
    )
'''


def component_source(step: Step) -> str:
    """The text of the step's `component.py`, formatted.

    Raises: UserError: its `ports.yaml` lacks one.
    """
    ports = _read_ports(step)
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        step=step,
        ports=ports,
        entry=_docstring_entry,
        inputs=_mapping({port: port for port in step.inputs}),
        shown={port: _ARTIFACT_CLASSES[Path(file).suffix] for port, file in step.shown.items()},
        shown_files=_mapping({file: port for port, file in step.shown.items()}),
        sections=SECTIONS if step.checks_sections else {},
    )


def _read_ports(step: Step) -> dict[str, str]:
    """The description of each port, an input's with the form of its value."""
    file = component_folder(step) / "ports.yaml"
    described: dict[str, Any] = yaml.safe_load(file.read_text())
    ports = {port["name"]: port["description"] for port in described["inputs"] + described["outputs"]}
    missing = {*step.inputs, *step.outputs} - set(ports)
    if missing:
        raise UserError(f"{file} does not describe {', '.join(sorted(missing))}: add it to inputs or outputs")
    for port in step.inputs:
        if port == BASE_MODEL:
            ports[port] += ": hf://org/name@revision, or the reference of a merged model"
        else:
            ports[port] = f"reference of {ports[port]}"
    return ports


def _docstring_entry(name: str, text: str, indent: int = 8) -> str:
    return textwrap.fill(
        f"{name}: {text}.",
        LINE_LENGTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _mapping(variables: Mapping[str, str]) -> str:
    """A dictionary of variables as the formatter leaves it, inside the call at the template's end."""
    entries = [f'"{key}": {variable}' for key, variable in variables.items()]
    line = f"{{{', '.join(entries)}}}"
    if len(line) <= LINE_LENGTH - len("        inputs=,"):
        return line
    return "\n            ".join(["{", *(f"{entry}," for entry in entries)]) + "\n        }"


def component_folder(step: Step) -> Path:
    """The step's folder."""
    return Path(finemill.__file__).parent / "components" / step.module_name


def main() -> None:
    """Write every step's component."""
    for step in STEPS.values():
        file = component_folder(step) / "component.py"
        file.write_text(component_source(step))
        print(file, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
