"""A pipeline as data: tasks, what flows between them, and what each needs. Rendered for KFP and for Argo."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finemill.components.config import StepConfig
from finemill.components.steps import STEPS, Step


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


@dataclass(frozen=True)
class Resources:
    """Requests and limits of one task's container, in Kubernetes units."""

    cpu: str
    memory: str
    gpus: int = 0


SMALL = Resources(cpu="1", memory="2Gi")
LARGE = Resources(cpu="4", memory="16Gi")
ONE_GPU = Resources(cpu="8", memory="32Gi", gpus=1)


@dataclass(frozen=True)
class Task:
    """One call of a step. Its output is one string, the artifact's reference."""

    step: Step
    inputs: Mapping[str, "Task | Parameter"]
    resources: Resources
    retries: int

    @property
    def name(self) -> str:
        """The step's name: a pipeline calls each step once."""
        return self.step.name

    @property
    def config(self) -> Parameter:
        """The parameter that carries the step's configuration."""
        return Parameter(self.step.module_name, f"Configuration of {self.name}; see `finemill schema {self.name}`.", {})

    @property
    def upstream(self) -> list["Task"]:
        """The tasks whose outputs this one reads."""
        return [source for source in self.inputs.values() if isinstance(source, Task)]


def task(step_name: str, *, resources: Resources = SMALL, retries: int = 2, **inputs: Task | Parameter) -> Task:
    """Call a step on other tasks' outputs.

    Raises: ValueError: an input is missing, unknown, or comes from a task with another kind of output.
    """
    step = STEPS[step_name]
    if set(inputs) != set(step.inputs):
        raise ValueError(f"{step_name} takes {step.inputs}, got {tuple(inputs)}")
    for port, source in inputs.items():
        if isinstance(source, Task) and source.step.output != port:
            raise ValueError(f"{step_name} wants {port}, {source.name} writes {source.step.output}")
    return Task(step, inputs, resources, retries)


@dataclass(frozen=True)
class Pipeline:
    """Tasks in an order in which they can run, and the model of the whole run's configuration."""

    name: str
    description: str
    tasks: tuple[Task, ...]
    config: type[StepConfig] = field(repr=False)

    @property
    def parameters(self) -> list[Parameter]:
        """The store, the tasks' own inputs, and one configuration per task; each once, in order of use."""
        found = {STORE.name: STORE}
        for item in self.tasks:
            for source in item.inputs.values():
                if isinstance(source, Parameter):
                    found[source.name] = source
        for item in self.tasks:
            found[item.config.name] = item.config
        return list(found.values())
