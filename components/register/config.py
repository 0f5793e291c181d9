"""Configuration of `register`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finemill.components.config import StepConfig
from finemill.components.registry import CHALLENGER, check_registered_model_name


class RegisterConfig(StepConfig):
    """Under which name, and with what besides its digests, a version is registered."""

    registered_model_name: Annotated[str, AfterValidator(check_registered_model_name)] = Field(
        default="finemill", min_length=1, max_length=256
    )
    """Name in MLflow's model registry; created if missing. MLflow forbids / : . % " ' in it."""

    source: Literal["model", "adapter"] = "model"
    """What the version's source points to: the merged model, or the adapter. Nothing is uploaded."""

    alias: str = Field(default=CHALLENGER, pattern=r"^(?!v\d+$|latest$|champion$|previous_champion$)[A-Za-z0-9_-]+$")
    """Alias that the new version gets; champion and previous_champion are given by `promote` and `rollback`."""

    tags: dict[str, str] = Field(default_factory=dict)
    """Further tags of the version, such as a ticket or an owner."""
