"""Where MLflow is: read from the environment once, by whoever starts a step, and passed on as a value."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from finemill.errors import UserError

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
REGISTRY_VARIABLE = "MLFLOW_REGISTRY_URI"
ADOPT_VARIABLE = "MLFLOW_RUN_ID"
DEFAULT_EXPERIMENT = "finemill"
_EXAMPLES = "sqlite:///folder/mlflow.db or http(s)://host"


@dataclass(frozen=True)
class Tracking:
    """MLflow's settings in MLflow's terms; those of MLflow's client, such as credentials, it reads by itself.

    Without `uri` nothing is recorded. The model registry is there too, unless `registry_uri` names another place.
    `adopted_run` is the id of a run that somebody else has started for this step or for its pipeline.
    """

    uri: str | None = None
    registry_uri: str | None = None
    adopted_run: str | None = None
    experiment_id: str | None = None
    experiment_name: str = DEFAULT_EXPERIMENT

    @classmethod
    def of_environment(
        cls, variables: Mapping[str, str] | None = None, *, default_uri: str | None = None
    ) -> "Tracking":
        """What the variables `MLFLOW_...` say, empty ones like absent ones; `default_uri` where they name no place."""
        variables = os.environ if variables is None else variables
        return cls(
            uri=variables.get(TRACKING_VARIABLE) or default_uri,
            registry_uri=variables.get(REGISTRY_VARIABLE) or None,
            adopted_run=variables.get(ADOPT_VARIABLE) or None,
            experiment_id=variables.get("MLFLOW_EXPERIMENT_ID") or None,
            experiment_name=variables.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT,
        )

    @property
    def runs(self) -> str:
        """Where runs are recorded. Raises: UserError: nowhere."""
        if self.uri is None:
            raise UserError(f"{TRACKING_VARIABLE} is not set: give {_EXAMPLES}")
        return self.uri

    @property
    def registry(self) -> str:
        """Where the model registry is. Raises: UserError: nowhere."""
        uri = self.registry_uri or self.uri
        if uri is None:
            raise UserError(f"{TRACKING_VARIABLE} is not set: the model registry is in MLflow; give {_EXAMPLES}")
        return uri


NOWHERE = Tracking()
"""No MLflow at all."""
