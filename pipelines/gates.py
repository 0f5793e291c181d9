"""What a pipeline asks for in promote's section besides what the step does."""

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from finemill.components.promote.config import Gate, PromoteConfig


class PreferencePromoteConfig(PromoteConfig):
    """The gates between a new version and the champion: on `preference_accuracy`, as in `configs/align.yaml`."""

    gates: tuple[Gate, ...]
    """All must pass. Those of `promote` ask for a lower loss on the chosen answers, which DPO raises as a rule."""

    @model_validator(mode="before")
    @classmethod
    def _has_gates(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "gates" not in values:
            raise ValueError(
                "give gates: those of `promote` ask for a lower loss, which aligning raises as a rule; write "
                "gates: [{metric: preference_accuracy, direction: higher, min_delta: 0.0}]"
            )
        return values
