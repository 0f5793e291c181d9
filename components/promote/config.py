"""Configuration of `promote`, `rollback` and `approve`."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from finemill.config import StepConfig
from finemill.registry.snapshot import check_registered_model_name
from finemill.registry.webhook import check_webhook_url


class Gate(StepConfig):
    """What one metric must show. Differences count so that positive is better, whatever the direction."""

    metric: str = Field(min_length=1)
    """A column of the evaluation's samples (`exact_match`, `loss`), compared row by row; or a metric of its
    metrics.json without `eval/tuned/` (`perplexity`), whose two values are compared."""
    direction: Literal["higher", "lower"]
    """Which values are better."""
    min_delta: float | None = Field(default=None, ge=0)
    """The new version must be better by more than this, in the metric's unit. Give this or max_regression."""
    max_regression: float | None = Field(default=None, ge=0)
    """The new version may be worse by at most this, in the metric's unit."""
    compare_with: tuple[Literal["base", "champion"], ...] = ("base", "champion")
    """What the difference is taken to: the base model as control, and the champion where there is one."""
    min_value: float | None = None
    """The new version's value must not be under this, whatever the others have."""
    max_value: float | None = None
    """The new version's value must not be over this."""
    required: bool = True
    """Whether an evaluation without this metric is an error; otherwise the gate is left out."""

    @model_validator(mode="after")
    def _has_one_rule(self) -> Self:
        if self.min_delta is not None and self.max_regression is not None:
            raise ValueError(f"gate {self.metric}: give min_delta (must be better) or max_regression (may be worse)")
        has_difference = self.min_delta is not None or self.max_regression is not None
        if has_difference != bool(self.compare_with):
            raise ValueError(
                f"gate {self.metric}: compare_with needs min_delta or max_regression; for bounds alone write "
                "compare_with: []"
            )
        if not has_difference and self.min_value is None and self.max_value is None:
            raise ValueError(f"gate {self.metric}: give min_delta, max_regression, min_value or max_value")
        return self

    @property
    def controls_base(self) -> bool:
        """Whether passing means to be better than the base model."""
        return "base" in self.compare_with and self.min_delta is not None


class PromoteConfig(StepConfig):
    """The gates between a new version and the champion."""

    gates: tuple[Gate, ...] = (
        Gate(metric="loss", direction="lower", min_delta=0.0),
        Gate(metric="exact_match", direction="higher", max_regression=0.02, required=False),
    )
    """All must pass. By default: a lower loss than base and champion, and at most 2 points less exact match."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """How sure a difference must be: the one-sided lower bound of the paired bootstrap at this level counts."""
    num_resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples of the held-out rows."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    correction: Literal["none", "holm"] = "none"
    """With `holm` a required comparison must also hold by its p-value, corrected for how many comparisons there are.
    Without it a version is promoted by chance no more often than `confidence` says: all gates must pass."""
    require_approval: bool = False
    """Whether a version also needs a person's word, `finemill approve VERSION --by NAME --why REASON`."""
    webhook_url: Annotated[str, AfterValidator(check_webhook_url)] | None = None
    """Address that is told when the champion changes, in the form of MLflow's webhooks, signed with the secret in
    FINEMILL_WEBHOOK_SECRET; for a registry without a server of MLflow's, and for serving systems."""
    strict: bool = False
    """Whether a version that is not promoted is a failure (exit code 3) instead of a result."""

    @model_validator(mode="after")
    def _has_control(self) -> Self:
        if not any(gate.controls_base for gate in self.gates):
            raise ValueError("gates: one must have min_delta and base in compare_with: a version has to beat its base")
        return self


class _SignedConfig(StepConfig):
    registered_model_name: Annotated[str, AfterValidator(check_registered_model_name)] = "finemill"
    """Name in MLflow's model registry."""
    by: str | None = Field(default=None, min_length=1, max_length=200)
    """Who does it, for the record. Default: this machine's user."""
    why: str | None = Field(default=None, min_length=1, max_length=2000)
    """Why, for the record."""


class RollbackConfig(_SignedConfig):
    """Which model gets its previous champion back."""

    webhook_url: Annotated[str, AfterValidator(check_webhook_url)] | None = None
    """As in promote: address that is told which version is champion again."""


class ApproveConfig(_SignedConfig):
    """Which version a person approves."""

    version: int = Field(ge=1)
    """Number of the version."""
