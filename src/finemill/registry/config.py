"""Which registered model: the configuration of `register`, and of the steps that look at what is registered."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finemill.config import StepConfig
from finemill.registry.snapshot import check_registered_model_name


class RegisterConfig(StepConfig):
    """Under which name, and with what besides its digests, a version is registered."""

    registered_model_name: Annotated[str, AfterValidator(check_registered_model_name)] = Field(
        default="finemill", min_length=1, max_length=256
    )
    """Name in MLflow's model registry; created if missing. Letters, digits, . _ - (MLflow forbids / and :)."""

    source: Literal["model", "adapter"] = "model"
    """What the version's source points to: the merged model, or the adapter. Nothing is uploaded."""

    tags: dict[str, str] = Field(default_factory=dict)
    """Further tags of the version, such as a ticket or an owner."""
