"""Configuration of `preflight`."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from finemill.config import StepConfig


class PreflightSettings(StepConfig):
    """What a run in a cluster is checked against before it takes a GPU."""

    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of the GPU that training will get, GiB; `null` reports the estimate and compares it with nothing."""

    host_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of the container that training will get, GiB, without /dev/shm: with less of it less may wait there, and
    the GPU must have more. `finemill compile` takes it from the cluster's settings; `null` for any."""


class PreflightConfig(PreflightSettings):
    """The settings, and the run they are checked for; a pipeline fills the second part in."""

    base_model: str | None = None
    """The base model that the run will tune."""

    steps: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Configuration of the run's other steps, by section."""
