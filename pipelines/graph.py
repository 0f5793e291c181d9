"""A pipeline as data: tasks, what flows between them, and what each needs. Rendered for KFP and for Argo."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from finemill.artifacts.ports import BASE_MODEL
from finemill.config import StepConfig
from finemill.runtime.catalog import STEPS, Step


@dataclass(frozen=True)
class Parameter:
    """A value given when a run is submitted: text, or a mapping (a step's configuration)."""

    name: str
    description: str
    default: str | Mapping[str, Any] | None = None

    @property
    def is_mapping(self) -> bool:
        """Whether it is a structure in KFP and JSON text in Argo."""
        return isinstance(self.default, Mapping)


STORE = Parameter("store", "Folder or s3://bucket/prefix that gets every artifact.")
GPUS = Parameter("gpus", "GPUs of each step that wants one; 0 runs those steps on the CPU.", "1")


@dataclass(frozen=True)
class Resources:
    """What a task's container asks for, in Kubernetes units; `size` is its key in a cluster's settings."""

    size: Literal["small", "large", "gpu"]
    cpu: str
    memory: str
    gpu: bool = False


SMALL = Resources("small", cpu="1", memory="2Gi")
LARGE = Resources("large", cpu="4", memory="16Gi")
ONE_GPU = Resources("gpu", cpu="8", memory="32Gi", gpu=True)


@dataclass(frozen=True)
class Task:
    """One call of a step. Its output is one string, the artifact's reference, and the step's verdict if it has one."""

    step: Step
    inputs: Mapping[str, "Task | Parameter"]
    resources: Resources
    retries: int
    after: tuple["Task", ...] = ()
    when: "Task | None" = None
    section_class: type[StepConfig] | None = None

    @property
    def name(self) -> str:
        """The step's name: a pipeline calls each step once."""
        return self.step.name

    @property
    def config(self) -> Parameter:
        """The parameter that carries the step's configuration."""
        return step_config(self.step.config_section)

    @property
    def section(self) -> type[StepConfig]:
        """The class of its section in the run's configuration."""
        return self.section_class or self.step.section_class

    @property
    def upstream(self) -> list["Task"]:
        """The tasks that must have ended before this one starts."""
        sources = [source for source in self.inputs.values() if isinstance(source, Task)]
        gate = [self.when] if self.when else []
        return [*sources, *(item for item in (*self.after, *gate) if item.name not in {task.name for task in sources})]


def step_config(section: str) -> Parameter:
    """The parameter that carries one section of the configuration."""
    return Parameter(section, f"Configuration of {section}; see `finemill schema {section.replace('_', '-')}`.", {})


def task(
    step_name: str,
    *,
    resources: Resources = SMALL,
    retries: int = 2,
    after: tuple[Task, ...] = (),
    when: Task | None = None,
    section_class: type[StepConfig] | None = None,
    **inputs: Task | Parameter,
) -> Task:
    """Call a step on other tasks' outputs.

    Args:
        step_name: its name in the catalogue.
        resources: requests and limits of its container.
        retries: further attempts after a lost node or exit code 75.
        after: tasks that must succeed first, besides those whose outputs it reads.
        when: a task with a verdict; without a yes this one is skipped.
        section_class: of its section in the run's configuration, where the pipeline asks for more than the step.
        inputs: a task or parameter per input of the step.
    Raises: ValueError: an input is missing, unknown, or comes from a task with another kind of output.
    """
    step = STEPS[step_name]
    if set(inputs) != set(step.inputs):
        raise ValueError(f"{step_name} takes {step.inputs}, got {tuple(inputs)}")
    for port, source in inputs.items():
        if isinstance(source, Task) and source.step.kind != port:
            raise ValueError(f"{step_name} wants {port}, {source.name} writes {source.step.kind}")
    if when is not None and when.step.verdict is None:
        raise ValueError(f"{step_name} waits for a verdict of {when.name}, which gives none")
    return Task(step, inputs, resources, retries, after, when, section_class)


@dataclass(frozen=True)
class Pipeline:
    """Tasks in an order in which they can run."""

    name: str
    description: str
    tasks: tuple[Task, ...]

    @property
    def config_name(self) -> str:
        """The class in `pipelines/config.py`, which `make components` writes."""
        return "".join(word.capitalize() for word in self.name.split("-")) + "Config"

    @property
    def config(self) -> type[StepConfig]:
        """The model of the whole run's configuration."""
        loaded: type[StepConfig] = getattr(import_module("finemill.pipelines.config"), self.config_name)
        return loaded

    @property
    def values(self) -> list[Parameter]:
        """The parameters that tasks read as they are, each once, in order of use."""
        sources = [source for item in self.tasks for source in item.inputs.values() if isinstance(source, Parameter)]
        return list({source.name: source for source in sources}.values())

    @property
    def sections(self) -> dict[str, Task]:
        """The sections of the configuration, each with the first task that reads it."""
        found: dict[str, Task] = {}
        for item in self.tasks:
            found.setdefault(item.config.name, item)
        return found

    @property
    def parameters(self) -> list[Parameter]:
        """The store, the tasks' own inputs, and one configuration per section; each once, in order of use."""
        gpus = [GPUS] if any(item.resources.gpu for item in self.tasks) else []
        return [STORE, *self.values, *gpus, *(item.config for item in self.sections.values())]

    def checks(self, task: Task) -> list[Parameter]:
        """What goes into a task's configuration besides its own section: the base model, and each other section."""
        if not task.step.checks_sections:
            return []
        base_model = [item for item in self.values if item.name == BASE_MODEL]
        return [*base_model, *(item.config for item in self.sections.values() if item != task)]
