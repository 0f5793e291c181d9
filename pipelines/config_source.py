"""The source of `pipelines/config.py`: each pipeline's configuration, from what its graph reads.

The classes are a file so that editors and type checkers know them. `make components` writes it anew.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from finemill.config import StepConfig
from finemill.pipelines.catalog import PIPELINES
from finemill.pipelines.graph import Parameter, Pipeline

LINE_LENGTH = 120
FILE = Path(__file__).parent / "config.py"
_TEMPLATE = '''\
"""The configuration of each pipeline, a section per step; `make components` writes it from the graphs."""

from pydantic import Field

{% for line in imports %}
{{ line }}
{% endfor %}
{% for name, (description, fields) in classes.items() %}


class {{ name }}(StepConfig):
    """{{ description }}"""
{% for declaration, text in fields %}

    {{ declaration }}
    {{ text }}
{% endfor %}
{% endfor %}
'''


def config_source(pipelines: Iterable[Pipeline]) -> str:
    """The text of `config.py`, formatted."""
    classes: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    imported: set[type[StepConfig]] = set()
    for pipeline in pipelines:
        sections = {name: task.section for name, task in pipeline.sections.items()}
        imported |= set(sections.values())
        fields = [_value(item) for item in pipeline.values] + [_section(*item) for item in sections.items()]
        classes[pipeline.config_name] = (pipeline.description, fields)
    imports = sorted(
        [f"from {StepConfig.__module__} import Input, {StepConfig.__name__}"]
        + [f"from {item.__module__} import {item.__name__}" for item in imported]
    )
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(imports=imports, classes=classes)


def _value(item: Parameter) -> tuple[str, str]:
    default = "" if item.default is None else f' = "{item.default}"'
    return f"{item.name}: Input{default}", _docstring(item.description)


def _section(name: str, model: type[StepConfig]) -> tuple[str, str]:
    """A section with a required field is required."""
    default = [] if any(item.is_required() for item in model.model_fields.values()) else [model.__name__]
    # Python's abstract classes, pydantic's models among them, have a `register` of their own.
    alias = name if hasattr(StepConfig, name) else None
    options = [f"default_factory={item}" for item in default] + ([f'alias="{alias}"'] if alias else [])
    field = f" = Field({', '.join(options)})" if options else ""
    return f"{name}{'_' if alias else ''}: {model.__name__}{field}", _docstring(inspect.getdoc(model) or "")


def _docstring(text: str) -> str:
    return textwrap.fill(
        f'"""{" ".join(text.split())}"""',
        LINE_LENGTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 4,
        break_long_words=False,
        break_on_hyphens=False,
    ).lstrip()


if __name__ == "__main__":
    FILE.write_text(config_source(PIPELINES.values()))
    print(FILE, file=sys.stderr)
