"""Score the champion where a new version was scored, before the two are compared."""

from collections.abc import Mapping
from pathlib import Path

from finemill.artifacts.champion import Champion, write_champion
from finemill.registry.champion import comparable_evaluation
from finemill.registry.config import RegisterConfig
from finemill.registry.snapshot import CHAMPION, RegisteredModel, Version, read_registered_model, registry_state_of
from finemill.runtime.context import StepContext
from finemill.tracking.settings import Tracking


def champion_state(inputs: Mapping[str, str], config: RegisterConfig, tracking: Tracking) -> dict[str, str]:
    """Which registered model, and which version is its champion."""
    model, champion = _champion(config, tracking)
    return (
        {"registered_model": registry_state_of(model), "champion": str(champion.number)} if model and champion else {}
    )


def run(*, output_dir: Path, config: RegisterConfig, context: StepContext) -> dict[str, float]:
    """Find or make an evaluation of the champion that `promote` can compare with the new version's.

    Raises: UserError: the champion has to be scored again, and cannot be here.
    """
    model, champion = _champion(config, context.tracking)
    record = Champion(registered_model_name=config.registered_model_name)
    if model and champion:
        found = comparable_evaluation(model, champion, context.manifests["evaluation"], context)
        record = record.model_copy(update={"champion": champion.number, "evaluation": str(found)})
    write_champion(output_dir, record)
    return {"score_champion/champion": float(champion.number if champion else 0)}


def _champion(config: RegisterConfig, tracking: Tracking) -> tuple[RegisteredModel | None, Version | None]:
    model = read_registered_model(tracking.registry, config.registered_model_name)
    return model, model.by_alias(CHAMPION) if model else None
